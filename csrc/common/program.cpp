#include "program.h"

#include "ep/check.h"

namespace ep {
namespace {

class Reader {
 public:
  Reader(const Ints& flat, int64_t nodes, const Ints& ends)
      : flat_(flat), ends_(ends), nodes_(nodes), count_(static_cast<int64_t>(ends.size() / 2)) {}

  int64_t next() {
    EP_CHECK(at_ < flat_.size(), "relax", "program", "more integers", flat_.size());
    return flat_[at_++];
  }

  int64_t count() {
    const int64_t n = next();
    EP_CHECK(n >= 0 && n <= static_cast<int64_t>(flat_.size()), "relax", "program",
             "a count within its " << flat_.size() << " integers", n);
    return n;
  }

  int64_t index(const char* what, int64_t from, int64_t size) {
    const int64_t i = next();
    EP_CHECK(i >= from && i < size, "relax", "program", what << " index from " << from << " to " << size - 1, i);
    return i;
  }

  // Connections of a step: those whose `end` (0 source, 1 destination) is its node.
  Ints connections(int64_t node, int end) {
    Ints out(count());
    for (int64_t& c : out) {
      c = index("a connection", 0, count_);
      const int64_t at = ends_[2 * c + end];
      EP_CHECK(at == node, "relax", "program",
               (end == 0 ? "a connection out of node " : "a connection into node ") << node,
               "connection " << c << ", " << (end == 0 ? "out of node " : "into node ") << at);
    }
    return out;
  }

  // ops: how many of Op a section may hold: drives; also nudges; also steps.
  Launches launches(int64_t ops) {
    Launches out(count());
    for (Launch& launch : out) {
      launch.op = static_cast<Op>(index("an op", 0, ops));
      if (launch.op == Op::kDrive) {
        launch.index = index("a connection", 0, count_);
        continue;
      }
      launch.index = index("a node", 1, nodes_);
      if (launch.op == Op::kNudge) continue;
      launch.nudged = next() != 0;
      launch.finished = connections(launch.index, 1);
      launch.below = connections(launch.index, 1);
      launch.above = connections(launch.index, 0);
    }
    return out;
  }

  bool done() const { return at_ == flat_.size(); }

 private:
  const Ints& flat_;
  const Ints& ends_;
  const int64_t nodes_, count_;
  size_t at_ = 0;
};

}  // namespace

Program decode(const Ints& flat, int64_t nodes, const Ints& ends) {
  Reader reader(flat, nodes, ends);
  Program program;
  program.prologue = reader.launches(2);
  program.sweeps.resize(reader.count());
  for (Launches& sweep : program.sweeps) sweep = reader.launches(3);
  program.refresh = reader.launches(1);
  EP_CHECK(reader.done() && !program.sweeps.empty(), "relax", "program", "at least one sweep and no integers after it",
           flat.size() << " integers");
  return program;
}

}  // namespace ep
