#include "connection.h"

#include <algorithm>

#include "parallel.h"
#include "passes.h"

namespace ep::cpu {
namespace {

Tensor convolve(const Tensor& source, const Tensor& weight, const Geometry& g, ScalarType operands) {
  const ScalarType dtype = source.scalar_type();
  const Tensor w = cast(weight, operands);
  if (g.linear) {
    const Tensor flat = torch::stable::reshape(source, {source.size(0), w.size(1)});
    return cast(aten::matmul(cast(flat, operands), aten::transpose(w)), dtype);
  }
  return dense(cast(aten::convolution(cast(source, operands), w, g.stride, g.padding, false, {0, 0}), dtype));
}

Windows windows(const Tensor& map) { return {map.size(2), map.size(3), map.size(1)}; }

}  // namespace

Tensor pooled_drive(const Tensor& source, const Tensor& weight, const Geometry& g, const Tensor* frozen,
                    Tensor* winners, ScalarType operands) {
  const Tensor map = convolve(source, weight, g, operands);
  if (g.pool == Pool::kNone) return map;
  const Windows w = windows(map);
  const int64_t batch = map.size(0);
  const Ints shape{batch, w.channels, w.rows(), w.columns()};
  const Tensor pooled = empty(shape, map);
  const bool live = g.pool == Pool::kMax && !frozen;
  if (live) *winners = empty(shape, map, ScalarType::Byte);
  dispatch(map.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* z = data<T>(map);
    T* out = mutable_data<T>(pooled);
    uint8_t* won = live ? mutable_data<uint8_t>(*winners) : nullptr;
    const uint8_t* given = frozen ? data<uint8_t>(*frozen) : nullptr;
    const int64_t given_batch = frozen ? frozen->size(0) : 1;
    const auto& pass = passes<T>();
    for_each_row(batch, w.rows(), w.columns() * w.channels, [&](int64_t n, int64_t begin, int64_t end) {
      const T* from = z + n * w.map_size();
      T* to = out + n * w.pooled_size();
      if (live) {
        pass.max_pool(w, from, to, won + n * w.pooled_size(), begin, end);
      } else if (given) {
        pass.gather_pool(w, from, given + (n % given_batch) * w.pooled_size(), to, begin, end);
      } else {
        pass.avg_pool(w, from, to, begin, end);
      }
    });
    return 0;
  });
  return pooled;
}

Tensor unpool(const Tensor& pooled, const Tensor* winners, const Ints& size) {
  const int64_t batch = pooled.size(0), channels = pooled.size(1);
  const Tensor map = empty({batch, channels, size[0], size[1]}, pooled);
  const Windows w{size[0], size[1], channels};
  dispatch(pooled.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* s = data<T>(pooled);
    T* out = mutable_data<T>(map);
    const uint8_t* won = winners ? data<uint8_t>(*winners) : nullptr;
    const int64_t won_batch = winners ? winners->size(0) : 1;
    const auto& pass = passes<T>();
    for_each_row(batch, w.rows(), w.columns() * channels, [&](int64_t n, int64_t begin, int64_t end) {
      const uint8_t* win = won ? won + (n % won_batch) * w.pooled_size() : nullptr;
      pass.unpool(w, s + n * w.pooled_size(), win, out + n * w.map_size(), begin, end);
    });
    return 0;
  });
  return map;
}

Tensor feedback(const Tensor& above, const Tensor& weight, const Geometry& g, const Ints& shape, const Tensor* winners,
                ScalarType operands) {
  const ScalarType dtype = above.scalar_type();
  const Tensor w = cast(weight, operands);
  if (g.linear) {
    const Tensor back = cast(aten::matmul(cast(above, operands), w), dtype);
    return shape.size() == 4 ? dense(torch::stable::reshape(back, shape)) : back;
  }
  const Ints size = g.map_size(shape, sizes(weight));
  Tensor map = above;
  if (g.pool == Pool::kMax && !winners) {
    Tensor first = empty(sizes(above), above, ScalarType::Byte);
    std::fill_n(mutable_data<uint8_t>(first), first.numel(), uint8_t{0});
    map = unpool(above, &first, size);
  } else if (g.pool != Pool::kNone) {
    map = unpool(above, g.pool == Pool::kMax ? winners : nullptr, size);
  }
  Ints extra(2);
  for (int i : {0, 1}) {
    extra[i] = shape[2 + i] + 2 * g.padding[i] - weight.size(2 + i) - (size[i] - 1) * g.stride[i];
  }
  return dense(cast(aten::convolution(cast(map, operands), w, g.stride, g.padding, true, extra), dtype));
}

}  // namespace ep::cpu
