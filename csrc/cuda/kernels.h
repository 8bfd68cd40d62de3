// What the host calls: parameters of every kernel, and functions that launch one on a stream.
//
// Buffers are dense [N, H, W, C] maps whose channels are padded to a multiple of kPad (a vector is a map of one
// position; padding holds zeros), and K-major matrices [rows, taps C] with both ends padded. A tensor of fewer samples
// than the launch is read modulo its own. Nothing here allocates, waits, or knows about torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ep/elementwise.h"

namespace ep::cuda {

constexpr int kPad = 16;         // channels: 64 bytes of float32, so that every row begins at a 16-byte boundary
constexpr int kMaxLoops = 4;     // convolutions of one step
constexpr int kMaxFinished = 4;  // finished drives and feedbacks of one step

// Element types in memory.
enum class Type : int32_t { kFloat = 0, kHalf = 1, kBFloat = 2, kByte = 3 };

// How products are formed; accumulation is float32 in all. kFloat multiplies in float32, kTf32 rounds float32 operands.
enum class Products : int32_t { kFloat = 0, kTf32 = 1, kHalf = 2, kBFloat = 3 };

constexpr Type operand_type(Products products) {
  return products == Products::kHalf ? Type::kHalf : products == Products::kBFloat ? Type::kBFloat : Type::kFloat;
}

// State of a running relaxation on the device, zero before the first launch.
struct Control {
  int32_t stop;    // nonzero: launches that look at it do nothing
  int32_t sweeps;  // finished ones
  int32_t ticket;  // blocks of a sweep's last launch that have ended
};

// One K loop of an implicit GEMM: acc[position, row] += sum over taps and channels of map * matrix. Tap (r, s) of the
// output position (h, w) reads the map at ((h mul_h + r + off_h) / div_h, (w mul_w + s + off_w) / div_w) where that
// divides and lies inside, else zero.
struct Loop {
  const void* map;     // [N, height, width, channels] in operand_type
  const void* matrix;  // [rows, kernel_h kernel_w channels] in operand_type
  int32_t height, width, channels;
  int32_t kernel_h, kernel_w;
  int32_t mul_h, mul_w, div_h, div_w, off_h, off_w;
  int32_t flip;  // the matrix's taps in reverse order
  float after;   // the accumulator is multiplied by this after the loop
};

// gain * tensor, float32 [samples, H, W, C].
struct Finished {
  const float* tensor;
  int32_t samples;
  float gain;
};

// P^-1 of a state onto a map of the operands' type. An odd last row or column of the map is not written.
struct Unpool {
  void* map;  // [N, height, width, C], or null
  Type type;
  int32_t height, width;
  Pool pool;               // kMax or kAvg
  const uint8_t* winners;  // kMax: [samples, H, W, C]
  int32_t winners_samples;
};

// One relaxation step of one node (reference: `step`). fresh = (1 - eta) old + eta clip(slope a).
struct Step {
  Loop loops[kMaxLoops];
  Finished finished[kMaxFinished];
  int32_t loop_count, finished_count;
  const float* bias;   // [C] or null
  const float* nudge;  // [nudge_samples, H, W, C] or null; negated for samples of the second phase
  int32_t nudge_samples;
  float nudge_gain;
  const void* old;  // [N, H, W, C] in state_type, or null: zero. May be `fresh`.
  void* fresh;      // [N, H, W, C] in state_type
  Type state_type;
  void* operand;  // a copy of `fresh` in operand_copy, or null
  Type operand_copy;
  const float* pre;  // delta forms: gamma a of the free equilibrium, [pre_samples, H, W, C]
  int32_t pre_samples;
  float* pre_out;  // gamma a, or null
  Unpool unpool;
  int32_t* residual;  // [sweeps, N]: bits of a float, raised to this node's largest change; -1.0f before
  Control* control;
  int32_t n, height, width, channels;  // of the node; channels are padded
  int32_t real_channels;               // the others become zero
  int32_t second;                      // first sample of the second phase (n if there is none)
  Form form;
  float damping, slope, lo, hi, scale, tol;
  bool stop;    // look at control->stop
  bool finish;  // last launch of a sweep: counts it and, with `stop`, compares its residuals with tol
};

// gain * P(W * s) of one connection (reference: `drive`); what was there before pooling is never stored.
struct Drive {
  Loop loop;
  Pool pool;
  float gain;
  float* drive;            // [N, H, W, C] after pooling
  const uint8_t* winners;  // frozen ones, [winners_samples, H, W, C], or null: the largest wins
  int32_t winners_samples;
  uint8_t* winners_out;  // [N, H, W, C] or null
  const void* state;     // with `unpool`: what it unpools, [N, H, W, C], at the winners of this launch
  Type state_type;
  Unpool unpool;  // (its winners are not read)
  Control* control;
  int32_t n, height, width, channels;  // of the drive, after pooling
  bool stop;
};

// Per position d = d+ - d- and m = s + mean_gain (d+ + d-) at one end of a connection, at the winners where it pools;
// and partial sums of d for the bias. With live winners (of both phases) each phase's state m +- gain d / 2 has its
// own, and gain d is what is stored for d.
struct Difference {
  const void* free;  // [N, H, W, C], any float type
  Type free_type;
  const void* delta;  // [phases N, H, W, C]
  Type delta_type;
  int32_t phases;
  Pool pool;
  const uint8_t* winners;  // [winners_samples, H, W, C]; N or, live, 2 N
  int32_t winners_samples;
  void* difference;  // [N, map_height, map_width, C] in `type`, zeroed before if the map has an odd row or column
  void* mean;        // the same, or null
  Type type;
  int32_t map_height, map_width;  // where it pools; else the state's
  float* sums;                    // [blocks, C] or null
  int32_t blocks;
  int32_t n, height, width, channels;
  float mean_gain, gain;
};

// partial[split] = ratio <difference above, W * mean below> + <mean above, W * difference below>, differentiated by W.
struct Contrast {
  const void* difference_above;  // [N, height, width, rows] in operand_type
  const void* mean_below;        // [N, below_height, below_width, columns]
  const void* mean_above;        // null, with difference_below, when the source is clamped
  const void* difference_below;
  float* partial;  // [splits, rows, taps, columns]
  int32_t n, height, width, rows, below_height, below_width, columns;
  int32_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  int32_t splits, share;  // positions of one split
  float ratio;
};

// out[i] = scale * sum over parts of partial[part, i], in a fixed order.
struct Sum {
  const float* partial;
  int32_t parts;
  int64_t size;
  float scale;
  float* out;
};

// out[n] = (add ? out[n] : 0) + gain * in[n % samples] over [n, size] elements; size is a multiple of 4.
struct Accumulate {
  const void* in;
  Type type;
  int32_t samples;
  float gain;
  float* out;
  int32_t n;
  int64_t size;
  bool add;
  const Control* control;  // null: not stoppable
};

// Features of a head at s, or free + inverse_scale s: averaged to pool x pool (adaptive), float32.
struct HeadFeature {
  const void* state;  // [N, H, W, C] in state_type, or null: zero
  Type state_type;
  const float* free;  // [free_samples, H, W, C] or null
  int32_t free_samples;
  float inverse_scale;
  float* feature;  // [N, rows, columns, C]
  int32_t n, height, width, channels, rows, columns;
  const Control* control;
};

// In place: outputs z become dL/dz = factor (softmax(z / temperature) - target) or factor (z - target).
struct HeadError {
  float* outputs;       // [N, positions, channels]; padding becomes zero
  const float* bias;    // [channels] or null
  const float* target;  // [target_samples, positions, channels]
  int32_t target_samples;
  int32_t n, positions, channels, real_channels;
  Loss loss;
  float factor, temperature;
  const Control* control;
};

// total = (add ? total : 0) + the adjoint of HeadFeature's averaging.
struct HeadSpread {
  const float* feature;  // [N, rows, columns, C]
  float* total;          // [N, H, W, C]
  int32_t n, height, width, channels, rows, columns;
  bool add;
  const Control* control;
};

// to[i] = from[i] for a 4-dimensional index; strides in elements (0 repeats). What lies outside `limit` is zero.
struct Copy {
  const void* from;
  void* to;
  Type from_type, to_type;
  int32_t size[4];   // of the destination, which is dense
  int32_t limit[4];  // of the source
  int64_t from_stride[4];
};
constexpr int kMaxCopies = 24;  // in one launch: kernel parameters hold 4 KiB
struct Copies {
  Copy copy[kMaxCopies];
  int32_t count;
};

// P^-1 of a state alone.
struct UnpoolState {
  const void* state;
  Type type;
  Unpool unpool;
  int32_t n, height, width, channels;
  const Control* control;
};

// Moves the states of a stopped `sync` run to the slot where a run of all its sweeps has them: if the parity of the
// sweeps done is not `parity`, `to` becomes `from`.
struct Settle {
  const void* from;
  void* to;
  int64_t bytes;  // a multiple of 16
  int32_t parity;
  const Control* control;
};

// What a device can do; the launch functions choose tiles by it.
struct Device {
  int32_t processors;     // multiprocessors
  int32_t shared_memory;  // bytes of each
  bool warpgroups;        // multiply by wgmma
};

void launch(const Step& step, Products products, const Device& device, cudaStream_t stream);
void launch(const Drive& drive, Products products, const Device& device, cudaStream_t stream);
void launch(const Contrast& contrast, Products products, cudaStream_t stream);
// Splits and share of a contrast: fills them in; returns the number of floats that `partial` needs.
int64_t split(Contrast& contrast, Products products, const Device& device);

void launch(const Difference& difference, cudaStream_t stream);
void launch(const Sum& sum, cudaStream_t stream);
void launch(const Accumulate& accumulate, cudaStream_t stream);
void launch(const HeadFeature& feature, cudaStream_t stream);
void launch(const HeadError& error, cudaStream_t stream);
void launch(const HeadSpread& spread, cudaStream_t stream);
void launch(const Copies& copies, cudaStream_t stream);
void launch(const UnpoolState& unpool, cudaStream_t stream);
void launch(const Settle& settle, cudaStream_t stream);

}  // namespace ep::cuda
