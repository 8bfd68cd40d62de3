// Nudges on the device: the summed gradients of a node's heads, in exact float32.
#pragma once

#include "tasks.h"

namespace ep::cuda {

// Appends the launches that leave the gradients of node i's heads, and its extra nudge, in its nudge buffer; the heads
// read `state` (null: zero). False, and nothing is appended, if there are none.
bool lower_nudge(const Relaxation& r, Buffers& buffers, int64_t node, const Buffer* state, Tasks& tasks);

}  // namespace ep::cuda
