// The arguments of drive, relax_step and contrast, checked once for every backend.
#pragma once

#include "geometry.h"

namespace ep {

// Raises unless they fit together; winners only count where the connection has max pooling.
Geometry check_drive(const Rules& rules, const Tensor& source, const Tensor& weight, const Ints& stride,
                     const Ints& padding, int64_t pool, const std::optional<Tensor>& winners);

// In the order of the schemas (csrc/schemas.h).
struct StepArguments {
  const Tensor& state;
  const std::optional<Tensor>& bias;
  const Tensors& drives;
  const Floats& drive_gains;
  const Tensors &below, &below_weights;
  const Ints& below_geometry;
  const Floats& below_gains;
  const Tensors &above, &above_weights, &above_winners;
  const Ints& above_geometry;
  const Floats& above_gains;
  const std::optional<Tensor>& nudge;
  double nudge_gain;
  const std::optional<Tensor>& preactivation;
  int64_t form, phases;
  double damping, slope, lo, hi, scale;
};

// Geometries of the connections that a step convolves.
struct StepGeometry {
  std::vector<Geometry> below, above;
};

StepGeometry check_relax_step(const Rules& rules, const StepArguments& arguments);

struct ContrastArguments {
  const Tensor& source;
  const std::optional<Tensor>& source_delta;
  const Tensor &target, &target_delta;
  const Ints &weight_shape, &stride, &padding;
  int64_t pool;
  const std::optional<Tensor>& winners;
  double source_gain, target_gain, centre, scale;
  int64_t operands;
};

struct ContrastGeometry {
  Geometry geometry;
  Ints driven;  // shape of the connection's drive
  bool live;    // winners of both phases
};

ContrastGeometry check_contrast(const Rules& rules, const ContrastArguments& arguments);

}  // namespace ep
