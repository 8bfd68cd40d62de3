// Where an op runs: the device of its tensors, current while the op runs, and torch's current stream there.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../common/tensors.h"
#include "kernels.h"
#include "runtime.h"

namespace ep::cuda {

class Place {
 public:
  explicit Place([[maybe_unused]] const Tensor& tensor) {
#ifdef EP_HOST_RUN  // tests/host: tensors lie on the CPU, and there is no device to make current
    const int32_t index = 0;
#else
    const int32_t index = tensor.get_device_index();
    if (tensor.is_cpu()) throw std::runtime_error("ep_kernels: tensors on the cpu among those of a CUDA op");
    guard_.emplace(index);
#endif
    stream_ = current_stream(index);
    device_ = device_of(index);
  }

  cudaStream_t stream() const { return stream_; }
  const Device& device() const { return device_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_;
  Device device_;
};

}  // namespace ep::cuda
