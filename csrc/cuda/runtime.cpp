#include "runtime.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>

namespace ep::cuda {

Device device_of(int32_t index) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    EP_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index));
    return value;
  };
  Device device{attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                false};
#ifdef EP_HAVE_SM90A
  const char* const wgmma = std::getenv("EP_KERNELS_WGMMA");
  device.warpgroups = wgmma && std::string(wgmma) == "1" && attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#endif
  return device;
}

#ifdef EP_HOST_RUN

cudaStream_t current_stream(int32_t) { return nullptr; }

#else

namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);  // torch/csrc/inductor/aoti_torch/c/shim.h

CurrentStream find_current_stream() {
  // loaded already, by torch: CUDA tensors exist
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  if (!symbol) {
    throw std::runtime_error(std::string("ep_kernels: torch's CUDA library has no current stream: ") +
                             (library ? "aoti_torch_get_current_cuda_stream is not in it" : "it is not loaded"));
  }
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

cudaStream_t current_stream(int32_t device) {
  static const CurrentStream current = find_current_stream();
  void* stream = nullptr;
  if (current(device, &stream) != 0) throw std::runtime_error("ep_kernels: torch did not give its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

#endif

}  // namespace ep::cuda
