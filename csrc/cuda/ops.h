// The CUDA kernels behind torch.ops.ep_kernels.*; schemas and their meaning: csrc/ops.cpp.
#pragma once

#include <optional>
#include <tuple>

#include "../common/checks.h"
#include "kernels.h"

namespace ep::cuda {

// What drive, relax_step and contrast take; and what relax takes.
extern const Rules kRules, kRelaxRules;

// Of operands by their code in the schema; 0: tensors in their own type.
Products products_of(Type own, int64_t operands = 0);

std::tuple<Tensor, Tensor> drive(const Tensor& source, const Tensor& weight, const Ints& stride, const Ints& padding,
                                 int64_t pool, const std::optional<Tensor>& winners);

std::tuple<Tensor, Tensor, Tensor> relax_step(
    const Tensor& state, const std::optional<Tensor>& bias, const Tensors& drives, const Floats& drive_gains,
    const Tensors& below, const Tensors& below_weights, const Ints& below_geometry, const Floats& below_gains,
    const Tensors& above, const Tensors& above_weights, const Tensors& above_winners, const Ints& above_geometry,
    const Floats& above_gains, const std::optional<Tensor>& nudge, double nudge_gain,
    const std::optional<Tensor>& preactivation, int64_t form, int64_t phases, double damping, double slope, double lo,
    double hi, double scale, bool keep);

std::tuple<Tensor, Tensor> contrast(const Tensor& source, const std::optional<Tensor>& source_delta,
                                    const Tensor& target, const Tensor& target_delta, const Ints& weight_shape,
                                    const Ints& stride, const Ints& padding, int64_t pool,
                                    const std::optional<Tensor>& winners, double source_gain, double target_gain,
                                    double centre, double scale, int64_t operands);

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensor> relax(
    const Tensors& states, const Tensors& weights, const Tensors& biases, const Tensors& drives, const Tensors& winners,
    const Tensors& free, const Tensors& preactivations, const Tensors& heads, const Tensors& extra, const Ints& shapes,
    const Ints& connections, const Ints& head_spec, const Ints& program, const Floats& drive_gains,
    const Floats& feedback_gains, const Floats& nudge_gains, const Floats& scales, const Floats& head_scalars,
    int64_t batch, int64_t phases, int64_t steps, int64_t form, bool frozen, bool deferred, int64_t operands,
    int64_t storage, bool keep, double damping, double slope, double lo, double hi, double tol);

// Forgets the programs of earlier relaxations, with their buffers and graphs, after their last use; returns how many.
int64_t release();

}  // namespace ep::cuda
