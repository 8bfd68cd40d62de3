#pragma once

#include "step.cuh"
#include "tile.cuh"

namespace ep::cuda {

template <Products P>
void launch_step(const Step& s, const Device& device, cudaStream_t stream) {
  const int64_t positions = static_cast<int64_t>(s.n) * s.height * s.width;
  with_gemm<P>(positions, s.channels, device, [&](auto tile) {
    using G = decltype(tile);
    const int64_t blocks = over(positions, G::kRows) * over(s.channels, G::kColumns);
    launch_kernel(&step_kernel<G>, blocks, G::kThreads, G::kSharedBytes, stream, s);
  });
}

}  // namespace ep::cuda
