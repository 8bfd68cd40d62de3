// The ops for C++: torch.ops.ep_kernels.* as functions of torch::stable::Tensor. Header-only, torch's stable ABI
// (>= 2.10); tensors on the CPU or a CUDA device, by way of torch's dispatcher.
//
// A program links to ep_kernels::ep_kernels (CMake) or loads libep_kernels.so before the first call, and has torch's
// libraries: docs/cuda.md, tests/package/consumer. Arguments are checked: an error is a std::runtime_error, whose
// reason torch writes to stderr or keeps in the exception, depending on its version. gamma a, below, is the slope times
// the pre-activation.
//
// Conventions shared by all: maps are [B, C, H, W] in channels_last memory (other layouts are copied), vectors [B, F];
// stride and padding are (height, width) pairs; pool is 0 none, 1 max, 2 average (2x2, stride 2, floor); winners are
// uint8 0..3, row-major in the window; form is 0 states, 1 delta, 2 tangent. A tensor with fewer samples than the batch
// is read modulo its own batch. Geometry lists hold (stride h, w, padding h, w, pool) per
// connection (of a linear one 1, 1, 0, 0, 0). In lists of
// tensors an empty 1-d tensor stands for an absent one. operands (of convolutions and matrix products) are 0 in the
// tensors' own dtype, 1 tf32, 2 float16, 3 bfloat16; storage (of states and deltas) is 0 own, 1 float16; a backend may
// lack some, see its sources. Equations: docs/concepts.md; semantics: ep_kernels/reference.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace ep::ops {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

namespace detail {

// Arguments as a stack, of at least `Results` values, for what comes back replaces them.
template <size_t Results, typename... Arguments>
auto call(const char* op, const Arguments&... arguments) {
  constexpr size_t kSize = sizeof...(Arguments) > Results ? sizeof...(Arguments) : Results;
  std::array<StableIValue, kSize> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

template <typename T, typename Stack>
T result(const Stack& stack, size_t index) {
  return torch::stable::detail::to<T>(stack[index]);
}

}  // namespace detail

struct Driven {
  Tensor drive;    // [B, C, H', W'] after pooling; vectors [B, F]
  Tensor winners;  // uint8, shaped like drive, if pool is max and none were given; else empty
};

// What a connection adds to the node above it: the convolution of source [B, C, H, W] with weight [C', C, kh, kw] (or
// [B, F] with [F', F]), pooled. With winners, the pixels that they name are taken instead of the largest.
inline Driven drive(const Tensor& source, const Tensor& weight, const Ints& stride, const Ints& padding, int64_t pool,
                    const std::optional<Tensor>& winners = std::nullopt) {
  const auto stack = detail::call<2>("ep_kernels::drive", source, weight, stride, padding, pool, winners);
  return {detail::result<Tensor>(stack, 0), detail::result<Tensor>(stack, 1)};
}

// Arguments of relax_step, named as in the schema. Geometry: 5 numbers per neighbour.
struct RelaxStep {
  Tensor state;                // [B, C, H, W] or [B, F]; of two phases, the second half of the samples is the second
  std::optional<Tensor> bias;  // [C] or [F]
  Tensors drives;              // finished ones, of any number of samples that divides B
  Floats drive_gains;
  Tensors below, below_weights;  // neighbours below, still to be convolved
  Ints below_geometry;
  Floats below_gains;
  Tensors above, above_weights, above_winners;  // neighbours above, whose feedback is added
  Ints above_geometry;
  Floats above_gains;
  std::optional<Tensor> nudge;  // negated for the second phase
  double nudge_gain = 0;
  std::optional<Tensor> preactivation;  // gamma a of the free state: forms 1 and 2 need it
  int64_t form = 0, phases = 1;
  double damping = 1, slope = 1, lo = 0, hi = 1, scale = 1;
  bool keep = false;  // return gamma a
};

struct Stepped {
  Tensor state;
  Tensor residual;       // [B]: largest change of each sample
  Tensor preactivation;  // gamma a if keep, else empty
};

// One relaxation step of one node.
inline Stepped relax_step(const RelaxStep& a) {
  const auto stack = detail::call<3>(
      "ep_kernels::relax_step", a.state, a.bias, a.drives, a.drive_gains, a.below, a.below_weights, a.below_geometry,
      a.below_gains, a.above, a.above_weights, a.above_winners, a.above_geometry, a.above_gains, a.nudge, a.nudge_gain,
      a.preactivation, a.form, a.phases, a.damping, a.slope, a.lo, a.hi, a.scale, a.keep);
  return {detail::result<Tensor>(stack, 0), detail::result<Tensor>(stack, 1), detail::result<Tensor>(stack, 2)};
}

struct Gradients {
  Tensor weight;  // shaped as weight_shape
  Tensor bias;
};

// Weight and bias gradient of one connection from the states of both phases (source below, target above).
inline Gradients contrast(const Tensor& source, const std::optional<Tensor>& source_delta, const Tensor& target,
                          const Tensor& target_delta, const Ints& weight_shape, const Ints& stride, const Ints& padding,
                          int64_t pool, const std::optional<Tensor>& winners, double source_gain, double target_gain,
                          double centre, double scale, int64_t operands = 0) {
  const auto stack = detail::call<2>("ep_kernels::contrast", source, source_delta, target, target_delta, weight_shape,
                                     stride, padding, pool, winners, source_gain, target_gain, centre, scale, operands);
  return {detail::result<Tensor>(stack, 0), detail::result<Tensor>(stack, 1)};
}

// Arguments of relax, named as in the schema: a whole plan. ep_kernels/relax_op.py shows how one is laid out.
struct Relax {
  Tensors states, weights, feedback_weights, biases, drives, winners, free, preactivations, heads, extra;
  Ints shapes, connections, head_spec, program, linear_nodes;
  Floats drive_gains, feedback_gains, nudge_gains, scales, head_scalars;
  int64_t batch = 0, phases = 1, steps = 0, form = 0;
  bool frozen = false, deferred = false;
  int64_t operands = 0, storage = 0;
  bool keep = false;
  double damping = 1, slope = 1, lo = 0, hi = 1, tol = 0;
};

struct Relaxed {
  Tensors states, preactivations;  // of nodes 1..
  Tensors drives, winners;         // per connection
  Tensor residual;                 // [steps, B]
};

// Up to `steps` sweeps of a plan, in one call.
inline Relaxed relax(const Relax& a) {
  const auto stack = detail::call<5>(
      "ep_kernels::relax", a.states, a.weights, a.feedback_weights, a.biases, a.drives, a.winners, a.free,
      a.preactivations, a.heads, a.extra, a.shapes, a.connections, a.head_spec, a.program, a.linear_nodes,
      a.drive_gains, a.feedback_gains, a.nudge_gains, a.scales, a.head_scalars, a.batch, a.phases, a.steps, a.form,
      a.frozen, a.deferred, a.operands, a.storage, a.keep, a.damping, a.slope, a.lo, a.hi, a.tol);
  return {detail::result<Tensors>(stack, 0), detail::result<Tensors>(stack, 1), detail::result<Tensors>(stack, 2),
          detail::result<Tensors>(stack, 3), detail::result<Tensor>(stack, 4)};
}

}  // namespace ep::ops
