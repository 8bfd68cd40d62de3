// The plan of a relaxation as flat integers: what ep_kernels/relax_op.py encodes and relax executes.
#pragma once

#include <vector>

#include "tensors.h"

namespace ep {

enum class Op : int64_t { kDrive = 0, kNudge = 1, kStep = 2 };

struct Launch {
  Op op;
  int64_t index;  // connection (drive) or node
  bool nudged = false;
  Ints finished, below, above;  // connections (step)
};

using Launches = std::vector<Launch>;

struct Program {
  Launches prologue;
  std::vector<Launches> sweeps;  // the last repeats
  Launches refresh;
};

// ends: 2 per connection (source, destination). Raises on a truncated program, on node or connection indices out of
// range, on a step that reads a connection of another node, and on steps outside sweeps.
Program decode(const Ints& flat, int64_t nodes, const Ints& ends);

}  // namespace ep
