// One relaxation as data: the arguments of torch.ops.ep_kernels.relax, read and checked once for every backend.
#pragma once

#include "geometry.h"
#include "head.h"
#include "program.h"

namespace ep {

// In the order of the schema (csrc/schemas.h).
struct RelaxArguments {
  const Tensors &states, &weights, &feedback_weights, &biases, &drives, &winners, &free, &preactivations, &heads;
  const Tensors& extra;
  const Ints &shapes, &connections, &head_spec, &program, &linear_nodes;
  const Floats &drive_gains, &feedback_gains, &nudge_gains, &scales, &head_scalars;
  int64_t batch, phases, steps, form;
  bool frozen, deferred;
  int64_t operands, storage;
  bool keep;
  double damping, slope, lo, hi, tol;
};

struct Connection {
  int64_t src, dst;
  Geometry geometry;
  Tensor weight, own_feedback_weight, drive, winners;  // all but the first may be absent
  double drive_gain, feedback_gain;

  const Tensor& feedback_weight() const { return present(own_feedback_weight) ? own_feedback_weight : weight; }
};

struct Node {
  Ints shape;                  // [batch, ...]
  Tensor state, bias, extra;   // each may be absent; `extra` holds samples()
  Tensor free, preactivation;  // delta forms, not of node 0: samples()
  double nudge_gain, scale, lo, hi;
};

struct Relaxation {
  std::vector<Connection> connections;
  std::vector<Node> nodes;
  std::vector<Head> heads;
  Program program;
  int64_t batch, phases, steps;
  bool frozen, deferred, keep;
  int64_t operands, storage;  // codes of the schema
  Dynamics<double> dynamics;  // of no node in particular: scale 1, the box of those that have one
  double tol;
  Tensor like;  // a tensor of the dtype and device of all

  int64_t samples() const { return batch / phases; }  // of the free phase
};

// Raises on arguments that describe no relaxation, or one that the rules exclude.
Relaxation read_relaxation(const Rules& rules, const RelaxArguments& arguments);

}  // namespace ep
