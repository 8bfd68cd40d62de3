// One connection on tensors: convolution, pooling and their adjoints.
#pragma once

#include "aten.h"
#include "passes.h"

namespace ep::cpu {

struct Geometry {
  bool linear = false;
  Ints stride{1, 1};
  Ints padding{0, 0};
  Pool pool = Pool::kNone;

  Ints map_size(const Ints& source, const Ints& weight) const;     // of the convolution's output, [H, W]
  Ints drive_shape(const Ints& source, const Ints& weight) const;  // [B, C, H, W] or [B, F]
};

// Raises unless the weight, the source's shape and the geometry fit together; like: dtype and device.
void check_connection(const char* op, const Ints& source, const Tensor& weight, const Geometry& geometry,
                      const Tensor& like);
// Raises unless shape, dtype and device are as given.
void check_like(const char* op, const char* argument, const Tensor& tensor, const Ints& shape, const Tensor& like);
void check_floating(const char* op, const char* argument, const Tensor& tensor);
void check_winners(const char* op, const Tensor& winners, const Ints& drive_shape, int64_t batch);

// P(W * s). With live winners (max pooling, `frozen` absent) `winners` receives them. Operands are cast to
// `operands` first; the result has the source's dtype.
Tensor pooled_drive(const Tensor& source, const Tensor& weight, const Geometry& geometry, const Tensor* frozen,
                    Tensor* winners, ScalarType operands);

// W^T * P^-1(above), of `shape` [B, ...]; winners null with max pooling: every tie at the first index.
Tensor feedback(const Tensor& above, const Tensor& weight, const Geometry& geometry, const Ints& shape,
                const Tensor* winners, ScalarType operands);

// Unpools every sample onto maps of `size` (H, W); winners of sample n are those of n modulo their batch.
Tensor unpool(const Tensor& pooled, const Tensor* winners, const Ints& size);

}  // namespace ep::cpu
