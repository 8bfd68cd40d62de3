#pragma once

#include "drive.cuh"
#include "tile.cuh"

namespace ep::cuda {

template <Products P>
void launch_drive(const Drive& d, const Device& device, cudaStream_t stream) {
  const int64_t positions = static_cast<int64_t>(d.n) * d.height * d.width * (d.pool == Pool::kNone ? 1 : 4);
  with_gemm<P>(positions, d.channels, device, [&](auto tile) {
    using G = decltype(tile);
    const int64_t blocks = over(positions, G::kRows) * over(d.channels, G::kColumns);
    launch_kernel(&drive_kernel<G>, blocks, G::kThreads, G::kSharedBytes, stream, d);
  });
}

}  // namespace ep::cuda
