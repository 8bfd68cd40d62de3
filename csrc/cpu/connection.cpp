#include "connection.h"

#include <algorithm>
#include <limits>

#include "ep/check.h"
#include "parallel.h"

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

Ints Geometry::map_size(const Ints& source, const Ints& weight) const {
  return {(source[2] + 2 * padding[0] - weight[2]) / stride[0] + 1,
          (source[3] + 2 * padding[1] - weight[3]) / stride[1] + 1};
}

Ints Geometry::drive_shape(const Ints& source, const Ints& weight) const {
  if (linear) return {source[0], weight[0]};
  Ints size = map_size(source, weight);
  if (pool != Pool::kNone) size = {size[0] / 2, size[1] / 2};
  return {source[0], weight[0], size[0], size[1]};
}

void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  EP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, argument, "float32 or float64",
           torch::headeronly::toString(dtype));
}

void check_like(const char* op, const char* argument, const Tensor& tensor, const Ints& shape, const Tensor& like) {
  EP_CHECK(sizes(tensor) == shape, op, argument, "shape " << list(shape), list(tensor.sizes()));
  EP_CHECK(tensor.scalar_type() == like.scalar_type(), op, argument,
           "dtype " << torch::headeronly::toString(like.scalar_type()),
           torch::headeronly::toString(tensor.scalar_type()));
  EP_CHECK(tensor.is_cpu() == like.is_cpu(), op, argument, "a tensor on the same device as the others",
           (tensor.is_cpu() ? "one on the cpu" : "one on another device"));
}

void check_winners(const char* op, const Tensor& winners, const Ints& drive_shape, int64_t batch) {
  Ints expected = drive_shape;
  expected[0] = winners.dim() > 0 ? winners.size(0) : 0;
  EP_CHECK(sizes(winners) == expected, op, "winners", "shape " << list(drive_shape) << " (or a batch that divides its)",
           list(winners.sizes()));
  EP_CHECK(winners.scalar_type() == ScalarType::Byte, op, "winners", "dtype uint8",
           torch::headeronly::toString(winners.scalar_type()));
  const bool divides = expected[0] == 0 ? batch == 0 : batch % expected[0] == 0;
  EP_CHECK(divides, op, "winners", "a batch that divides " << batch, expected[0]);
}

void check_connection(const char* op, const Ints& source, const Tensor& weight, const Geometry& g, const Tensor& like) {
  check_floating(op, "source", like);
  EP_CHECK(weight.dim() == 4 || weight.dim() == 2, op, "weight",
           "4 dimensions [C_dst, C_src, kh, kw] or 2 [F_dst, F_src]", weight.dim() << " dimensions");
  const Ints size = sizes(weight);
  check_like(op, "weight", weight, size, like);
  for (int64_t n : size) EP_CHECK(n > 0, op, "weight", "positive sizes", list(size));
  if (g.linear) {
    EP_CHECK(source.size() == 4 || source.size() == 2, op, "source", "[B, C, H, W] or [B, F]", list(source));
    EP_CHECK(product(source, 1) == size[1], op, "source", size[1] << " features a sample", list(source));
    EP_CHECK(g.pool == Pool::kNone, op, "pool", "none for a linear connection", static_cast<int64_t>(g.pool));
    return;
  }
  EP_CHECK(source.size() == 4, op, "source", "4 dimensions [B, C, H, W]", list(source));
  EP_CHECK(source[1] == size[1], op, "source", size[1] << " channels (as weight)", source[1]);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // what convolutions take
  for (int i : {0, 1}) {
    EP_CHECK(g.stride[i] >= 1 && g.stride[i] <= kMost, op, "stride", "integers >= 1 (31 bits)", list(g.stride));
    EP_CHECK(g.padding[i] >= 0 && g.padding[i] <= kMost, op, "padding", "integers >= 0 (31 bits)", list(g.padding));
    EP_CHECK(source[2 + i] > 0 && source[2 + i] + 2 * g.padding[i] >= size[2 + i], op, "source",
             "a padded map of at least the kernel's size " << size[2] << "x" << size[3], list(source));
  }
  const Ints shape = g.drive_shape(source, size);
  EP_CHECK(shape[2] > 0 && shape[3] > 0, op, "source", "a map of at least 2x2 before pooling", list(source));
}

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
