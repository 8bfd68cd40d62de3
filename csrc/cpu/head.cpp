#include "head.h"

#include <algorithm>
#include <cmath>

#include "aten.h"

namespace ep::cpu {
namespace {

// In place: outputs z [rows, outputs] become dL/dz. Rows are samples, or pixels of a pointwise head.
template <typename T>
void error_of(const Head& head, const Tensor& bias, const Tensor& target, const Tensor& z) {
  const int64_t batch = z.size(0), outputs = z.size(1);
  if (z.numel() == 0) return;
  const int64_t rows = z.numel() / outputs, per_sample = rows / batch, target_rows = target.size(0) * per_sample;
  const T* shift = present(bias) ? data<T>(bias) : nullptr;
  const T weight = static_cast<T>(head.weight), tau = static_cast<T>(head.temperature);
  for (int64_t r = 0; r < rows; ++r) {
    T* out = mutable_data<T>(z) + r * outputs;
    const T* wanted = data<T>(target) + (r % target_rows) * outputs;
    if (shift) {
      for (int64_t i = 0; i < outputs; ++i) out[i] += shift[i];
    }
    if (head.loss == Loss::kMse) {
      for (int64_t i = 0; i < outputs; ++i) out[i] = weight * (out[i] - wanted[i]);
      continue;
    }
    if (head.loss == Loss::kCosine) {
      T z_square = 0, target_square = 0, product = 0;
      for (int64_t i = 0; i < outputs; ++i) {
        z_square += out[i] * out[i];
        target_square += wanted[i] * wanted[i];
        product += out[i] * wanted[i];
      }
      const CosineError<T> e = cosine_error(z_square, target_square, product, weight);
      for (int64_t i = 0; i < outputs; ++i) out[i] = e.z_factor * out[i] + e.target_factor * wanted[i];
      continue;
    }
    const T top = *std::max_element(out, out + outputs);
    T sum = 0;
    for (int64_t i = 0; i < outputs; ++i) sum += out[i] = std::exp((out[i] - top) / tau);
    for (int64_t i = 0; i < outputs; ++i) out[i] = weight * tau * (out[i] / sum - wanted[i]);
  }
}

}  // namespace

Tensor head_gradient(const Head& head, const Tensor& state) {
  const bool map = present(head.map);
  const Tensor feature = head.pool > 0 ? dense(aten::adaptive_avg_pool(state, head.pool)) : state;
  Tensor z = feature;
  if (head.pointwise) {
    z = dense(aten::convolution(feature, head.map, {1, 1}, {0, 0}, false, {0, 0}));
  } else if (map) {
    z = aten::matmul(torch::stable::reshape(feature, {feature.size(0), head.map.size(1)}), aten::transpose(head.map));
  } else {
    z = torch::stable::clone(feature);
  }
  dispatch(z.scalar_type(), [&](auto zero) {
    error_of<decltype(zero)>(head, head.bias, head.target, z);
    return 0;
  });
  Tensor back = z;
  if (head.pointwise) {
    back = aten::convolution(z, head.map, {1, 1}, {0, 0}, true, {0, 0});
  } else if (map) {
    back = torch::stable::reshape(aten::matmul(z, head.map), sizes(feature));
  }
  return dense(head.pool > 0 ? aten::adaptive_avg_pool_adjoint(torch::stable::contiguous(back), state) : back);
}

}  // namespace ep::cpu
