// A head: a loss of one node's state, whose gradient nudges it.
#pragma once

#include "checks.h"

namespace ep {

struct Head {
  int64_t node;
  Loss loss;
  int64_t pool;  // side of the averaged map; 0 keeps the state's
  bool pointwise;
  double weight, temperature;
  Tensor map, bias, target;  // map and bias absent: the identity
};

// One head of relax from its 4 integers, 2 scalars and 3 tensors, checked, on a node of shape [batch, ...]; targets
// hold `samples`.
Head head_of(const char* op, const int64_t* spec, const double* scalars, const Tensor* tensors, const Ints& node,
             int64_t samples, const Tensor& like);

}  // namespace ep
