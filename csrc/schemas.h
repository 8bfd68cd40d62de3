// Schemas of torch.ops.ep_kernels.*: drive, relax_step, contrast, relax.
//
// Conventions shared by all: maps are [B, C, H, W] in channels_last memory (other layouts are copied), vectors [B, F];
// stride and padding are (height, width) pairs; pool is 0 none, 1 max, 2 average (2x2, stride 2, floor); winners are
// uint8 0..3, row-major in the window; form is 0 states, 1 delta, 2 tangent. A tensor with fewer samples than the batch
// is read modulo its own batch. Geometry lists hold (stride h, w, padding h, w, pool) per connection. In lists of
// tensors an empty 1-d tensor stands for an absent one. operands (of convolutions and matrix products) are 0 in the
// tensors' own dtype, 1 tf32, 2 float16, 3 bfloat16; storage (of states and deltas) is 0 own, 1 float16; a backend may
// lack some, see its sources. Equations: docs/concepts.md; semantics: ep_kernels/reference.py.
#pragma once

#include <torch/csrc/stable/library.h>

namespace ep {

template <typename Library>
void define_ops(Library& m) {
  // -> (pooled drive, winners; winners are empty unless pool is max and none were given)
  m.def(
      "drive(Tensor source, Tensor weight, int[] stride, int[] padding, int pool, Tensor? winners=None)"
      " -> (Tensor, Tensor)");
  // -> (new state, residual [B], gamma a or empty)
  m.def(
      "relax_step(Tensor state, Tensor? bias, Tensor[] drives, float[] drive_gains,"
      " Tensor[] below, Tensor[] below_weights, int[] below_geometry, float[] below_gains,"
      " Tensor[] above, Tensor[] above_weights, Tensor[] above_winners, int[] above_geometry, float[] above_gains,"
      " Tensor? nudge, float nudge_gain, Tensor? preactivation, int form, int phases,"
      " float damping, float slope, float lo, float hi, float scale, bool keep) -> (Tensor, Tensor, Tensor)");
  // -> (gradient of the weight, of the bias)
  m.def(
      "contrast(Tensor source, Tensor? source_delta, Tensor target, Tensor target_delta, int[] weight_shape,"
      " int[] stride, int[] padding, int pool, Tensor? winners, float source_gain, float target_gain, float centre,"
      " float scale, int operands) -> (Tensor, Tensor)");
  // shapes: 3 per node (C, H, W; vectors F, 0, 0). connections: 7 per connection (src, dst, stride h, w, padding h, w,
  // pool). feedback_weights: none, or one for each connection (absent: its weight). linear_nodes: those whose states
  // lo and hi do not bound. heads: map, bias, target per head; head_spec: 4 per head (node, loss, pool, pointwise);
  // head_scalars: weight, temperature. program: csrc/common/program.h.
  // -> (states of nodes 1.., gamma a of nodes 1.., drives, winners per connection, residual [steps, B])
  m.def(
      "relax(Tensor[] states, Tensor[] weights, Tensor[] feedback_weights, Tensor[] biases, Tensor[] drives,"
      " Tensor[] winners, Tensor[] free, Tensor[] preactivations, Tensor[] heads, Tensor[] extra, int[] shapes,"
      " int[] connections, int[] head_spec, int[] program, int[] linear_nodes, float[] drive_gains,"
      " float[] feedback_gains, float[] nudge_gains, float[] scales, float[] head_scalars, int batch, int phases,"
      " int steps, int form, bool frozen, bool deferred, int operands, int storage, bool keep, float damping,"
      " float slope, float lo, float hi, float tol)"
      " -> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor)");
}

}  // namespace ep
