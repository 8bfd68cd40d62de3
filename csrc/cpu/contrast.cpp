// torch.ops.ep_kernels.contrast: both matrix products of the difference form as one gradient over a doubled batch.
#include <algorithm>

#include "../common/arguments.h"
#include "connection.h"
#include "ops.h"
#include "parallel.h"
#include "passes.h"

namespace ep::cpu {
namespace {

// Views of the two halves of a tensor along the batch.
std::pair<Tensor, Tensor> halves(const Tensor& t) {
  Tensor copy = t;
  const int64_t half = t.size(0) / 2;
  return {torch::stable::narrow(copy, 0, 0, half), torch::stable::narrow(copy, 0, half, half)};
}

// Difference (times difference_scale) and mean of the two phases of every sample, and the difference summed over
// samples and pixels, unscaled by `sum_scale`.
template <typename T>
void difference_and_mean(const Tensor& free, const Tensor& delta, double gain, double centre, double difference_scale,
                         const Tensor& difference, const Tensor* mean, const Tensor* sums) {
  const int64_t batch = free.size(0), channels = free.size(1);
  if (batch == 0) return;
  const int64_t size = free.numel() / batch;
  const bool two = delta.size(0) == 2 * batch;
  const T* f = data<T>(free);
  const T* d = data<T>(delta);
  T* diff = mutable_data<T>(difference);
  T* m = mean ? mutable_data<T>(*mean) : nullptr;
  std::vector<T> partial(sums ? batch * channels : 0);
  // gains may be tiny and the scale huge: their products are formed in double
  const T difference_gain = static_cast<T>(difference_scale * gain), mean_gain = static_cast<T>(centre * gain);
  const auto& pass = passes<T>();
  for_each_row(batch, 1, size, [&](int64_t n, int64_t, int64_t) {
    const Contrast<T> a{f + n * size, d + n * size, two ? d + (batch + n) * size : nullptr, difference_gain, mean_gain};
    pass.contrast(a, size, channels, diff + n * size, m ? m + n * size : nullptr,
                  sums ? partial.data() + n * channels : nullptr);
  });
  if (!sums) return;
  T* total = mutable_data<T>(*sums);
  for (int64_t n = 0; n < batch; ++n) {  // a fixed order: the same bits for any number of threads
    for (int64_t c = 0; c < channels; ++c) total[c] += partial[n * channels + c];
  }
}

// Live winners: the states of the two phases, unpooled each with its own, then their scaled difference and, unless the
// source is clamped, their mean, stacked.
template <typename T>
Tensor unpool_live(const Tensor& stacked, const Tensor& winners, const Ints& size, double scale, bool moving) {
  const int64_t batch = winners.size(0) / 2;
  const Tensor maps = unpool(stacked, &winners, size);
  Ints shape = sizes(maps);
  shape[0] = moving ? 2 * batch : batch;
  const Tensor out = empty(shape, maps);
  const int64_t map = maps.numel() / (2 * batch);
  const T* plus = data<T>(maps);
  const T* minus = plus + batch * map;
  T* difference = mutable_data<T>(out);
  T* mean = moving ? difference + batch * map : nullptr;
  const T factor = static_cast<T>(scale);
  for_each_row(1, batch, map, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin * map; i < end * map; ++i) {
      const T p = plus[i], m = minus[i];
      difference[i] = factor * (p - m);
      if (mean) mean[i] = (p + m) / 2;
    }
  });
  return out;
}

// free + gain * delta of both phases, stacked; with one phase the second half is the free states.
template <typename T>
Tensor phase_states(const Tensor& free, const Tensor& delta, double gain) {
  Ints shape = sizes(free);
  const int64_t count = free.numel();
  shape[0] *= 2;
  const Tensor out = empty(shape, free);
  const bool two = delta.numel() == 2 * count;
  const T* f = data<T>(free);
  const T* d = data<T>(delta);
  T* s = mutable_data<T>(out);
  for (int64_t i = 0; i < count; ++i) s[i] = f[i] + static_cast<T>(gain) * d[i];
  for (int64_t i = 0; i < count; ++i) s[count + i] = two ? f[i] + static_cast<T>(gain) * d[count + i] : f[i];
  return out;
}

Tensor zeros(const Ints& shape, const Tensor& like) {
  Tensor t = empty(shape, like);
  torch::stable::zero_(t);
  return t;
}

}  // namespace

std::tuple<Tensor, Tensor> contrast(const Tensor& source, const std::optional<Tensor>& source_delta,
                                    const Tensor& target, const Tensor& target_delta, const Ints& weight_shape,
                                    const Ints& stride, const Ints& padding, int64_t pool,
                                    const std::optional<Tensor>& winners, double source_gain, double target_gain,
                                    double centre, double scale, int64_t operands) {
  // the products are those of the tensors themselves, whatever `operands` says
  const auto [g, driven, live] =
      check_contrast(kRules, {source, source_delta, target, target_delta, weight_shape, stride, padding, pool, winners,
                              source_gain, target_gain, centre, scale, operands});
  const Tensor weight = empty(weight_shape, source);  // shape only: what ATen's gradient asks for

  const int64_t batch = source.size(0);
  const Tensor bias = zeros({weight_shape[0]}, source);
  if (batch == 0) return {zeros(weight_shape, source), bias};

  // above = [scale * difference of target; mean of target], below = [mean of source; scale * difference of source]
  const bool moving = source_delta.has_value();
  Ints above_shape = driven, below_shape = sizes(source);
  above_shape[0] = below_shape[0] = moving ? 2 * batch : batch;
  Tensor above = empty(above_shape, source);
  Tensor below = moving ? empty(below_shape, source) : dense(source);
  const Tensor free_source = dense(source), free_target = dense(target), delta_target = dense(target_delta);
  const auto [above_first, above_second] = moving ? halves(above) : std::pair{above, above};
  dispatch(source.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    difference_and_mean<T>(free_target, delta_target, target_gain, centre, scale, above_first,
                           moving ? &above_second : nullptr, &bias);
    if (moving) {
      const auto [below_first, below_second] = halves(below);
      difference_and_mean<T>(free_source, dense(*source_delta), source_gain, centre, scale, below_second, &below_first,
                             nullptr);
    }
    return 0;
  });
  if (g.linear) {
    const Tensor flat = torch::stable::reshape(below, {below.size(0), weight_shape[1]});
    return {aten::matmul(aten::transpose(above), flat), bias};
  }
  if (g.pool != Pool::kNone) {
    std::optional<Tensor> won;
    if (g.pool == Pool::kMax) won = dense(*winners);
    const Ints size = g.map_size(sizes(source), weight_shape);
    above = dispatch(source.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      if (!live) return unpool(above, won ? &*won : nullptr, size);
      return unpool_live<T>(phase_states<T>(free_target, delta_target, target_gain), *won, size, scale, moving);
    });
  }
  return {dense(aten::convolution_weight(above, below, weight, g.stride, g.padding)), bias};
}

}  // namespace ep::cpu
