#include "geometry.h"

#include <limits>

namespace ep {

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

Geometry geometry_of(const char* op, int64_t dimensions, const Ints& stride, const Ints& padding, int64_t pool) {
  EP_CHECK(stride.size() == 2, op, "stride", "2 integers", stride.size());
  EP_CHECK(padding.size() == 2, op, "padding", "2 integers", padding.size());
  EP_CHECK(pool >= 0 && pool <= 2, op, "pool", "0 (none), 1 (max) or 2 (avg)", pool);
  return {dimensions == 2, stride, padding, static_cast<Pool>(pool)};
}

void check_fit(const char* op, const Ints& source, const Ints& size, const Geometry& g) {
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

void check_connection(const char* op, const Rules& rules, const Ints& source, const Tensor& weight, const Geometry& g,
                      const Tensor& like) {
  check_floating(op, rules, "source", like);
  EP_CHECK(weight.dim() == 4 || weight.dim() == 2, op, "weight",
           "4 dimensions [C_dst, C_src, kh, kw] or 2 [F_dst, F_src]", weight.dim() << " dimensions");
  check_like(op, "weight", weight, sizes(weight), like);
  check_fit(op, source, sizes(weight), g);
}

}  // namespace ep
