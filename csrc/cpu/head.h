// Gradient of a head's loss with respect to the state that it reads.
#pragma once

#include "aten.h"

namespace ep::cpu {

enum class Loss : int64_t { kCrossEntropy = 0, kMse = 1 };

struct Head {
  int64_t node;
  Loss loss;
  int64_t pool;  // side of the averaged map; 0 keeps the state's
  bool pointwise;
  double weight, temperature;
  Tensor map, bias, target;  // map and bias absent: the identity
};

// dL/ds per sample, dense, in the state's shape; the target of sample n is that of n modulo its batch.
Tensor head_gradient(const Head& head, const Tensor& state);

}  // namespace ep::cpu
