// One relaxation step of one node from finished summands: the pass that relax_step and relax share.
#pragma once

#include <vector>

#include "../common/checks.h"

namespace ep::cpu {

// gain * tensor, read modulo the tensor's own batch; second_gain for samples of the second phase.
struct Summand {
  Tensor tensor;
  double gain;
  double second_gain;
};

// Writes the new state to `out` (may be `old` itself), gamma a to `pre_out` if not null, and raises the samples'
// entries of residual[batch] to the changes, in the states' units. bias, old, pre may be null.
void step(const std::vector<Summand>& summands, const Tensor* bias, const Tensor* old, const Tensor* pre,
          int64_t phases, const Dynamics<double>& dynamics, const Tensor& out, const Tensor* pre_out, double* residual);

}  // namespace ep::cpu
