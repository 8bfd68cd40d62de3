// One connection on tensors: convolution, pooling and their adjoints.
#pragma once

#include "../common/geometry.h"
#include "aten.h"

namespace ep::cpu {

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
