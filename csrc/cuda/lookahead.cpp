#include "lookahead.h"

#include <algorithm>

namespace ep::cuda {

const Launches& launches_of(const Relaxation& r, int64_t t) {
  return r.program.sweeps[std::min<size_t>(t, r.program.sweeps.size() - 1)];
}

bool read_later(const Relaxation& r, int64_t c, int64_t t, size_t at, bool after_step) {
  const Connection& conn = r.connections[c];
  const bool live = conn.geometry.pool == Pool::kMax && !r.frozen;
  bool visible = !(r.deferred && after_step);
  for (int64_t later = t; later < std::min(t + kLookahead, r.steps); ++later) {
    const Launches& launches = launches_of(r, later);
    bool moved = false;
    for (size_t k = later == t ? at + 1 : 0; k < launches.size(); ++k) {
      const Launch& launch = launches[k];
      const bool reads = std::count(launch.above.begin(), launch.above.end(), c) > 0;
      if (launch.op == Op::kStep && launch.index == conn.src && reads) return visible;
      if (launch.op == Op::kDrive && launch.index == c && live) return false;
      moved |= launch.op == Op::kStep && launch.index == conn.dst;
      if (moved && !r.deferred) return false;
    }
    if (moved) return false;
    visible = true;
  }
  return false;
}

}  // namespace ep::cuda
