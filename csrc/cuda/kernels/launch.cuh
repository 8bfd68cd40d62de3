// Launching a kernel of one parameter struct, checked.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <string>

#include "../runtime.h"

namespace ep::cuda {

constexpr size_t kPlainShared = 48 << 10;  // what a block may have without asking, static shared memory included

template <typename P>
void launch_kernel(void (*kernel)(P), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                   const P& params) {
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("ep_kernels: a launch of " + std::to_string(blocks) + " blocks; a grid holds 2^31 - 1");
  }
  if (shared >= kPlainShared) {
    EP_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
#ifdef __CUDACC__
  void* arguments[] = {const_cast<P*>(&params)};
  EP_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                 dim3(threads), arguments, shared, stream));
#else
  host::launch(reinterpret_cast<const void*>(kernel), kernel, static_cast<unsigned>(blocks), threads, shared, stream,
               params);
#endif
  EP_CUDA_CHECK(cudaGetLastError());
}

// Blocks of an element-wise kernel over `items`, each thread taking one; threads count them in 32 bits.
inline int64_t blocks_for(int64_t items, int threads) {
  if (items > std::numeric_limits<uint32_t>::max() - threads) {
    throw std::runtime_error("ep_kernels: a launch over " + std::to_string(items) + " items; 2^32 are the most");
  }
  return (items + threads - 1) / threads;
}

}  // namespace ep::cuda
