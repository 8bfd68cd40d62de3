// One connection's shape: convolution (or matrix product), pooling, and the sizes that follow.
#pragma once

#include "checks.h"

namespace ep {

struct Geometry {
  bool linear = false;
  Ints stride{1, 1};
  Ints padding{0, 0};
  Pool pool = Pool::kNone;

  Ints map_size(const Ints& source, const Ints& weight) const;     // of the convolution's output, [H, W]
  Ints drive_shape(const Ints& source, const Ints& weight) const;  // [B, C, H, W] or [B, F]
};

// Of a weight with `dimensions` (2: linear).
Geometry geometry_of(const char* op, int64_t dimensions, const Ints& stride, const Ints& padding, int64_t pool);

// Raises unless a weight's shape, the source's and the geometry fit together.
void check_fit(const char* op, const Ints& source, const Ints& weight, const Geometry& geometry);
// The same for a weight with the dtype and device of `like`.
void check_connection(const char* op, const Rules& rules, const Ints& source, const Tensor& weight,
                      const Geometry& geometry, const Tensor& like);

}  // namespace ep
