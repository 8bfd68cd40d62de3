// Tensors through the stable ABI: what every backend does with them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace ep {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;
using Tensors = std::vector<Tensor>;

inline Ints sizes(const Tensor& t) {
  const auto s = t.sizes();
  return Ints(s.begin(), s.end());
}

// An empty 1-d tensor stands for an absent one in the ops' lists.
inline bool present(const Tensor& t) { return !(t.dim() == 1 && t.numel() == 0); }

// Dense: NHWC maps (channels_last), [B, F] vectors.
inline Tensor empty(const Ints& shape, const Tensor& like, std::optional<ScalarType> dtype = std::nullopt) {
  using torch::headeronly::MemoryFormat;
  const auto format = shape.size() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(shape, dtype ? *dtype : like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format);
}

inline Tensor absent(const Tensor& like, std::optional<ScalarType> dtype = std::nullopt) {
  return empty({0}, like, dtype);
}

inline int64_t product(const Ints& shape, size_t from) {
  int64_t n = 1;
  for (size_t i = from; i < shape.size(); ++i) n *= shape[i];
  return n;
}

// The shape with another first size.
inline Ints with_batch(Ints shape, int64_t batch) {
  shape[0] = batch;
  return shape;
}

}  // namespace ep
