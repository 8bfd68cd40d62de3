#include "arguments.h"

#include <cmath>
#include <utility>

namespace ep {
namespace {

constexpr const char* kStep = "relax_step";
constexpr const char* kContrast = "contrast";

Geometry geometry_at(const Ints& flat, size_t index, const Tensor& weight) {
  const size_t at = 5 * index;
  return geometry_of(kStep, weight.dim(), {flat[at], flat[at + 1]}, {flat[at + 2], flat[at + 3]}, flat[at + 4]);
}

void check_lengths(const char* argument, size_t tensors, size_t weights, size_t geometry, size_t gains) {
  EP_CHECK(weights == tensors && geometry == 5 * tensors && gains == tensors, kStep, argument,
           tensors << " weights, " << 5 * tensors << " geometry integers and " << tensors << " gains (one set each)",
           weights << ", " << geometry << " and " << gains);
}

// A summand may hold fewer samples than the state: it is read modulo its batch.
Ints summand_shape(const Ints& shape, const Ints& summand) {
  const bool divides = !summand.empty() && summand[0] > 0 && shape[0] % summand[0] == 0;
  return divides ? with_batch(shape, summand[0]) : shape;
}

void check_summand(const char* argument, const Tensor& summand, const Tensor& state) {
  check_like(kStep, argument, summand, summand_shape(sizes(state), sizes(summand)), state);
}

void check_end(const char* name, const char* delta_name, const Tensor& free, const Tensor& delta) {
  Ints expected = sizes(free);
  if (delta.dim() > 0 && delta.size(0) == 2 * expected[0]) expected[0] *= 2;
  EP_CHECK(free.dim() == 4 || free.dim() == 2, kContrast, name, "[B, C, H, W] or [B, F]", list(free.sizes()));
  check_like(kContrast, delta_name, delta, expected, free);
}

}  // namespace

Geometry check_drive(const Rules& rules, const Tensor& source, const Tensor& weight, const Ints& stride,
                     const Ints& padding, int64_t pool, const std::optional<Tensor>& winners) {
  const Geometry g = geometry_of("drive", weight.dim(), stride, padding, pool);
  check_connection("drive", rules, sizes(source), weight, g, source);
  if (winners && g.pool == Pool::kMax) {
    check_winners("drive", *winners, g.drive_shape(sizes(source), sizes(weight)), source.size(0), source);
  }
  return g;
}

StepGeometry check_relax_step(const Rules& rules, const StepArguments& a) {
  EP_CHECK(a.state.dim() == 4 || a.state.dim() == 2, kStep, "state", "[B, C, H, W] or [B, F]", list(a.state.sizes()));
  check_floating(kStep, rules, "state", a.state);
  const Ints shape = sizes(a.state);
  check_dynamics(kStep, a.damping, a.slope, a.lo, a.hi, a.form, a.phases, shape[0]);
  EP_CHECK(std::isfinite(a.scale) && a.scale > 0, kStep, "scale", "a finite number > 0", a.scale);
  EP_CHECK(a.drive_gains.size() == a.drives.size(), kStep, "drive_gains", a.drives.size() << " (one per drive)",
           a.drive_gains.size());
  check_lengths("below", a.below.size(), a.below_weights.size(), a.below_geometry.size(), a.below_gains.size());
  check_lengths("above", a.above.size(), a.above_weights.size(), a.above_geometry.size(), a.above_gains.size());
  EP_CHECK(a.above_winners.size() == a.above.size(), kStep, "above_winners", a.above.size() << " (one per above)",
           a.above_winners.size());
  check_finite(kStep, "drive_gains", a.drive_gains);
  check_finite(kStep, "below_gains", a.below_gains);
  check_finite(kStep, "above_gains", a.above_gains);
  check_finite(kStep, "nudge_gain", {a.nudge_gain});

  StepGeometry out;
  for (const Tensor& drive : a.drives) check_summand("drives", drive, a.state);
  for (size_t i = 0; i < a.below.size(); ++i) {
    const Geometry g = geometry_at(a.below_geometry, i, a.below_weights[i]);
    EP_CHECK(g.pool != Pool::kMax, kStep, "below", "connections without max pooling (use drive for those)", "pool 1");
    const Ints below = sizes(a.below[i]);
    check_like(kStep, "below", a.below[i], below, a.state);
    check_connection(kStep, rules, below, a.below_weights[i], g, a.state);
    const Ints driven = g.drive_shape(below, sizes(a.below_weights[i]));
    check_shape(kStep, "below", driven, summand_shape(shape, driven));
    out.below.push_back(g);
  }
  for (size_t i = 0; i < a.above.size(); ++i) {
    const Geometry g = geometry_at(a.above_geometry, i, a.above_weights[i]);
    check_connection(kStep, rules, shape, a.above_weights[i], g, a.state);
    const Ints expected = g.drive_shape(shape, sizes(a.above_weights[i]));
    check_like(kStep, "above", a.above[i], expected, a.state);
    if (g.pool == Pool::kMax) check_winners(kStep, a.above_winners[i], expected, shape[0], a.state);
    out.above.push_back(g);
  }
  if (a.nudge) check_summand("nudge", *a.nudge, a.state);
  if (a.bias) check_like(kStep, "bias", *a.bias, {shape[1]}, a.state);
  if (a.form != 0) {
    EP_CHECK(a.preactivation.has_value(), kStep, "preactivation", "the free equilibrium's in a delta form", "none");
    check_summand("preactivation", *a.preactivation, a.state);
  }
  return out;
}

ContrastGeometry check_contrast(const Rules& rules, const ContrastArguments& a) {
  EP_CHECK(a.weight_shape.size() == 4 || a.weight_shape.size() == 2, kContrast, "weight_shape", "2 or 4 sizes",
           list(a.weight_shape));
  for (int64_t n : a.weight_shape) {
    EP_CHECK(n > 0, kContrast, "weight_shape", "positive sizes", list(a.weight_shape));
  }
  const int64_t dimensions = static_cast<int64_t>(a.weight_shape.size());
  const Geometry g = geometry_of(kContrast, dimensions, a.stride, a.padding, a.pool);
  check_floating(kContrast, rules, "source", a.source);
  check_fit(kContrast, sizes(a.source), a.weight_shape, g);
  const Ints driven = g.drive_shape(sizes(a.source), a.weight_shape);
  check_like(kContrast, "target", a.target, driven, a.source);
  check_end("target", "target_delta", a.target, a.target_delta);
  if (a.source_delta) check_end("source", "source_delta", a.source, *a.source_delta);
  const bool max = g.pool == Pool::kMax;
  EP_CHECK(!max || a.winners, kContrast, "winners", "those of the free equilibrium (max pooling)", "none");
  const bool live = max && a.winners->dim() > 0 && a.winners->size(0) == 2 * driven[0];
  if (max) check_winners(kContrast, *a.winners, driven, live ? 2 * driven[0] : driven[0], a.source);
  EP_CHECK(!live || a.centre == 0.5 || driven[0] == 0, kContrast, "centre", "0.5 with winners of both phases",
           a.centre);
  for (const auto& [name, value] : {std::pair{"source_gain", a.source_gain},
                                    {"target_gain", a.target_gain},
                                    {"centre", a.centre},
                                    {"scale", a.scale}}) {
    EP_CHECK(std::isfinite(value), kContrast, name, "a finite number", value);
  }
  check_operands(kContrast, a.operands);
  return {g, driven, live};
}

}  // namespace ep
