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
#ifdef EP_HOST_RUN  // tests/host: tensors lie on the CPU, and there is no device to make current
  explicit Place(const Tensor&) : index_(0) {
#else
  explicit Place(const Tensor& tensor) : index_(tensor.get_device_index()) {
    if (tensor.is_cpu()) throw std::runtime_error("ep_kernels: tensors on the cpu among those of a CUDA op");
    guard_.emplace(index_);
#endif
    stream_ = current_stream(index_);
    device_ = device_of(index_);
  }

  int32_t index() const { return index_; }
  cudaStream_t stream() const { return stream_; }
  const Device& device() const { return device_; }

 private:
  int32_t index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_;
  Device device_;
};

}  // namespace ep::cuda
