// torch.ops.ep_kernels.relax_step
#include "../common/arguments.h"
#include "connection.h"
#include "ops.h"
#include "step.h"

namespace ep::cpu {
std::tuple<Tensor, Tensor, Tensor> relax_step(
    const Tensor& state, const std::optional<Tensor>& bias, const Tensors& drives, const Floats& drive_gains,
    const Tensors& below, const Tensors& below_weights, const Ints& below_geometry, const Floats& below_gains,
    const Tensors& above, const Tensors& above_weights, const Tensors& above_winners, const Ints& above_geometry,
    const Floats& above_gains, const std::optional<Tensor>& nudge, double nudge_gain,
    const std::optional<Tensor>& preactivation, int64_t form, int64_t phases, double damping, double slope, double lo,
    double hi, double scale, bool keep) {
  const StepGeometry geometry = check_relax_step(
      kRules, {state,       bias,          drives,        drive_gains,   below,          below_weights, below_geometry,
               below_gains, above,         above_weights, above_winners, above_geometry, above_gains,   nudge,
               nudge_gain,  preactivation, form,          phases,        damping,        slope,         lo,
               hi,          scale});
  const Ints shape = sizes(state);
  const int64_t batch = shape[0];
  const ScalarType dtype = state.scalar_type();
  std::vector<Summand> summands;
  for (size_t i = 0; i < drives.size(); ++i) summands.push_back({dense(drives[i]), drive_gains[i], drive_gains[i]});
  for (size_t i = 0; i < below.size(); ++i) {
    const Geometry& g = geometry.below[i];
    const Tensor source = g.linear ? below[i] : dense(below[i]);
    summands.push_back(
        {pooled_drive(source, dense(below_weights[i]), g, nullptr, nullptr, dtype), below_gains[i], below_gains[i]});
  }
  for (size_t i = 0; i < above.size(); ++i) {
    const Geometry& g = geometry.above[i];
    std::optional<Tensor> winners;
    if (g.pool == Pool::kMax) winners = dense(above_winners[i]);
    const Tensor back =
        feedback(dense(above[i]), dense(above_weights[i]), g, shape, winners ? &*winners : nullptr, dtype);
    summands.push_back({back, above_gains[i], above_gains[i]});
  }
  if (nudge) summands.push_back({dense(*nudge), nudge_gain, -nudge_gain});
  std::optional<Tensor> flat_bias, pre;
  if (bias) flat_bias = dense(*bias);
  if (form != 0) pre = dense(*preactivation);
  const Tensor old = dense(state);
  const Tensor out = empty(shape, state);
  const Tensor pre_out = keep ? empty(shape, state) : absent(state);
  Floats residual(batch, 0.0);
  step(summands, flat_bias ? &*flat_bias : nullptr, &old, pre ? &*pre : nullptr, phases,
       {static_cast<Form>(form), damping, slope, lo, hi, scale}, out, keep ? &pre_out : nullptr, residual.data());
  const Tensor change = empty({batch}, state);
  dispatch(state.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t n = 0; n < batch; ++n) mutable_data<T>(change)[n] = static_cast<T>(residual[n]);
    return 0;
  });
  return {out, change, pre_out};
}

}  // namespace ep::cpu
