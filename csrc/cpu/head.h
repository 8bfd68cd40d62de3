// Gradient of a head's loss with respect to the state that it reads.
#pragma once

#include "../common/head.h"

namespace ep::cpu {

// dL/ds per sample, dense, in the state's shape; the target of sample n is that of n modulo its batch.
Tensor head_gradient(const Head& head, const Tensor& state);

}  // namespace ep::cpu
