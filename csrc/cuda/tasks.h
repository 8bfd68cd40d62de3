// The launches of a relaxation, bound to buffers: a flat list that is launched, or captured in a CUDA graph.
#pragma once

#include <array>
#include <variant>
#include <vector>

#include "buffers.h"
#include "kernels.h"

namespace ep::cuda {

struct Task {
  std::variant<Step, Drive, Accumulate, HeadFeature, HeadError, HeadSpread, UnpoolState, Settle> work;
  Products products;           // of steps and drives
  const char* what;            // for errors: "step of node"
  int64_t index;               // of that node, connection or head
  std::array<int64_t, 4> map;  // what it writes, [N, C, H, W], channels padded
};

using Tasks = std::vector<Task>;

inline std::array<int64_t, 4> map_of(const Buffer& b) { return {b.size[0], b.size[3], b.size[1], b.size[2]}; }

// Launches them in order; errors name the op, the task and its shape.
void launch(const Tasks& tasks, const Device& device, cudaStream_t stream);

}  // namespace ep::cuda
