// torch.ops.ep_kernels.relax_step
#include <cmath>

#include "ep/check.h"
#include "ops.h"
#include "step.h"

namespace ep::cpu {
namespace {

constexpr const char* kOp = "relax_step";

Geometry geometry_at(const Ints& flat, size_t index, const Tensor& weight) {
  const size_t at = 5 * index;
  return geometry_of(kOp, weight, {flat[at], flat[at + 1]}, {flat[at + 2], flat[at + 3]}, flat[at + 4]);
}

void check_lengths(const char* argument, size_t tensors, size_t weights, size_t geometry, size_t gains) {
  EP_CHECK(weights == tensors && geometry == 5 * tensors && gains == tensors, kOp, argument,
           tensors << " weights, " << 5 * tensors << " geometry integers and " << tensors << " gains (one set each)",
           weights << ", " << geometry << " and " << gains);
}

}  // namespace

void check_dynamics(const char* op, double damping, double slope, double lo, double hi, int64_t form, int64_t phases,
                    int64_t batch) {
  EP_CHECK(std::isfinite(damping) && damping > 0 && damping < 2 && (damping <= 1 || form == 0), op, "damping",
           "a number in (0, 1], or up to 2 in states form", damping);
  EP_CHECK(std::isfinite(slope) && slope > 0, op, "slope", "a finite number > 0", slope);
  EP_CHECK(std::isfinite(lo) && std::isfinite(hi) && lo < hi, op, "lo, hi", "finite, lo < hi", lo << ", " << hi);
  EP_CHECK(form >= 0 && form <= 2, op, "form", "0 (states), 1 (delta) or 2 (tangent)", form);
  EP_CHECK(phases == 1 || phases == 2, op, "phases", "1 or 2", phases);
  EP_CHECK(batch % phases == 0, op, "phases", "a divisor of the batch " << batch, phases);
}

void check_finite(const char* op, const char* argument, const Floats& values) {
  for (double v : values) EP_CHECK(std::isfinite(v), op, argument, "finite numbers", v);
}

void check_operands(const char* op, int64_t operands) {
  EP_CHECK(operands >= 0 && operands <= 3, op, "operands", "0 (own dtype), 1 (tf32), 2 (float16) or 3 (bfloat16)",
           operands);
}

std::tuple<Tensor, Tensor, Tensor> relax_step(
    const Tensor& state, const std::optional<Tensor>& bias, const Tensors& drives, const Floats& drive_gains,
    const Tensors& below, const Tensors& below_weights, const Ints& below_geometry, const Floats& below_gains,
    const Tensors& above, const Tensors& above_weights, const Tensors& above_winners, const Ints& above_geometry,
    const Floats& above_gains, const std::optional<Tensor>& nudge, double nudge_gain,
    const std::optional<Tensor>& preactivation, int64_t form, int64_t phases, double damping, double slope, double lo,
    double hi, double scale, bool keep) {
  EP_CHECK(state.dim() == 4 || state.dim() == 2, kOp, "state", "[B, C, H, W] or [B, F]", list(state.sizes()));
  check_floating(kOp, "state", state);
  const Ints shape = sizes(state);
  const int64_t batch = shape[0];
  check_dynamics(kOp, damping, slope, lo, hi, form, phases, batch);
  EP_CHECK(std::isfinite(scale) && scale > 0, kOp, "scale", "a finite number > 0", scale);
  EP_CHECK(drive_gains.size() == drives.size(), kOp, "drive_gains", drives.size() << " (one per drive)",
           drive_gains.size());
  check_lengths("below", below.size(), below_weights.size(), below_geometry.size(), below_gains.size());
  check_lengths("above", above.size(), above_weights.size(), above_geometry.size(), above_gains.size());
  EP_CHECK(above_winners.size() == above.size(), kOp, "above_winners", above.size() << " (one per above)",
           above_winners.size());
  for (const auto& [name, gains] :
       {std::pair{"drive_gains", &drive_gains}, {"below_gains", &below_gains}, {"above_gains", &above_gains}}) {
    check_finite(kOp, name, *gains);
  }
  check_finite(kOp, "nudge_gain", {nudge_gain});

  // a summand may hold fewer samples than the state: it is read modulo its batch
  const auto check_summand = [&](const char* name, const Tensor& t) {
    Ints expected = shape;
    if (t.dim() > 0 && t.size(0) > 0 && batch % t.size(0) == 0) expected[0] = t.size(0);
    check_like(kOp, name, t, expected, state);
  };

  std::vector<Summand> summands;
  for (size_t i = 0; i < drives.size(); ++i) {
    check_summand("drives", drives[i]);
    summands.push_back({dense(drives[i]), drive_gains[i], drive_gains[i]});
  }
  for (size_t i = 0; i < below.size(); ++i) {
    const Geometry g = geometry_at(below_geometry, i, below_weights[i]);
    EP_CHECK(g.pool != Pool::kMax, kOp, "below", "connections without max pooling (use drive for those)", "pool 1");
    check_like(kOp, "below", below[i], sizes(below[i]), state);
    check_connection(kOp, sizes(below[i]), below_weights[i], g, state);
    const Tensor driven = pooled_drive(g.linear ? below[i] : dense(below[i]), dense(below_weights[i]), g, nullptr,
                                       nullptr, state.scalar_type());
    check_summand("below", driven);
    summands.push_back({driven, below_gains[i], below_gains[i]});
  }
  for (size_t i = 0; i < above.size(); ++i) {
    const Geometry g = geometry_at(above_geometry, i, above_weights[i]);
    check_connection(kOp, shape, above_weights[i], g, state);
    const Ints expected = g.drive_shape(shape, sizes(above_weights[i]));
    check_like(kOp, "above", above[i], expected, state);
    std::optional<Tensor> winners;
    if (g.pool == Pool::kMax) {
      check_winners(kOp, above_winners[i], expected, batch);
      winners = dense(above_winners[i]);
    }
    summands.push_back({feedback(dense(above[i]), dense(above_weights[i]), g, shape, winners ? &*winners : nullptr,
                                 state.scalar_type()),
                        above_gains[i], above_gains[i]});
  }
  if (nudge) {
    check_summand("nudge", *nudge);
    summands.push_back({dense(*nudge), nudge_gain, -nudge_gain});
  }
  std::optional<Tensor> flat_bias, pre;
  if (bias) {
    check_like(kOp, "bias", *bias, {shape[1]}, state);
    flat_bias = dense(*bias);
  }
  if (form != 0) {
    EP_CHECK(preactivation.has_value(), kOp, "preactivation", "the free equilibrium's in a delta form", "none");
    check_summand("preactivation", *preactivation);
    pre = dense(*preactivation);
  }
  const Tensor old = dense(state);
  const Tensor out = empty(shape, state);
  const Tensor pre_out = keep ? empty(shape, state) : absent(state);
  Floats residual(batch, 0.0);
  step(summands, flat_bias ? &*flat_bias : nullptr, &old, pre ? &*pre : nullptr, phases,
       {damping, slope, lo, hi, scale, static_cast<Form>(form)}, out, keep ? &pre_out : nullptr, residual.data());
  const Tensor change = empty({batch}, state);
  dispatch(state.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t n = 0; n < batch; ++n) mutable_data<T>(change)[n] = static_cast<T>(residual[n]);
    return 0;
  });
  return {out, change, pre_out};
}

}  // namespace ep::cpu
