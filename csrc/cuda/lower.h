// From a relaxation's program to launches: which convolutions fuse into steps, which buffers they read, who unpools,
// who ends a sweep. Follows the relaxation symbolically, as ep_kernels/triton/lower.py does.
#pragma once

#include "tasks.h"

namespace ep::cuda {

struct Lowered {
  Tasks head, block, tail;  // a run: Buffers::start(), head, repeats times block, tail
  int64_t repeats = 0;
  // Results, null where there are none: of nodes (null: nothing reached it, its state is zero) and of connections.
  std::vector<const Buffer*> states, pre, drives, winners;
};

// Raises on programs that read what was not given.
Lowered lower(const Relaxation& r, Buffers& buffers);

}  // namespace ep::cuda
