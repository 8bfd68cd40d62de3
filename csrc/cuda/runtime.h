// The CUDA runtime and torch's current stream, checked.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>

#include "kernels.h"

// Raises with the call, its place and the runtime's own words unless a CUDA call succeeds.
#define EP_CUDA_CHECK(call) ::ep::cuda::check_call((call), #call, __FILE__, __LINE__)

namespace ep::cuda {

inline void check_call(cudaError_t error, const char* call, const char* file, int line) {
  if (__builtin_expect(error == cudaSuccess, 1)) return;
  cudaGetLastError();  // else the next launch would report this one again
  std::ostringstream message;
  message << "ep_kernels: " << call << " at " << file << ':' << line << ": " << cudaGetErrorName(error) << ", "
          << cudaGetErrorString(error);
  throw std::runtime_error(message.str());
}

// What a device can do. wgmma is in the build if 9.0a is, and used there if EP_KERNELS_WGMMA is 1.
Device device_of(int32_t index);

// torch's current stream of a device, through the stable shim of libtorch_cuda.so, which this library does not link to:
// it has to load where torch is built without CUDA.
cudaStream_t current_stream(int32_t device);

}  // namespace ep::cuda
