// One relaxation step of one node in one launch (reference: ep_kernels/reference.py, `step`).
#pragma once

#include "unpool.cuh"
#include "wgmma.cuh"

namespace ep::cuda {

// Largest changes of consecutive positions, kept while they are of one sample; one atomic for each run of them. The
// kLanes threads that share a position hold different channels of it.
template <int kLanes>
class Residual {
 public:
  __device__ Residual(int32_t* row, float scale) : row_(row), scale_(scale) {}

  __device__ void add(int32_t sample, float change) {
    // as integers, magnitudes have the order of floats, and NaN is above all
    int32_t bits = __float_as_int(change) & 0x7fffffff;
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, lanes));
    if (sample != sample_) {
      flush();
      sample_ = sample;
      most_ = bits;
    } else {
      most_ = max(most_, bits);
    }
  }

  __device__ void flush() const {
    if (sample_ < 0 || threadIdx.x % kLanes != 0) return;
    atomicMax(row_ + sample_, __float_as_int(__int_as_float(most_) / scale_));  // in the states' units
  }

 private:
  int32_t* row_;
  float scale_;
  int32_t sample_ = -1, most_ = 0;
};

// The last block of a sweep's last launch counts the sweep, and decides whether the relaxation has come to rest.
__device__ inline void finish_sweep(const Step& s, int32_t sweep) {
  __threadfence();  // this thread's residuals are out before its block's ticket
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    last = atomicAdd(&s.control->ticket, 1) == static_cast<int32_t>(gridDim.x) - 1;
    __threadfence();  // those of the other blocks are seen after theirs
  }
  if (!__syncthreads_or(last)) return;
  const volatile int32_t* row = s.residual + static_cast<int64_t>(sweep) * s.n;
  bool moving = false;
  for (int32_t n = threadIdx.x; s.stop && n < s.n; n += blockDim.x)
    moving |= !(__int_as_float(row[n]) <= s.tol);  // NaN moves
  moving = __syncthreads_or(moving);
  if (threadIdx.x != 0) return;
  s.control->ticket = 0;
  s.control->sweeps = sweep + 1;
  if (s.stop) s.control->stop = !moving && sweep > 0;
}

// What the update of four channels of one position reads from memory.
struct Reads {
  Four old, finished, nudge, pre;
  uint32_t won;
};

// Index of an element of a tensor of `samples` samples.
__device__ inline int64_t shared_element(const Step& s, int32_t position, int32_t channel, int32_t samples) {
  return static_cast<int64_t>(shared_position(position, s.height * s.width, samples, s.n)) * s.channels + channel;
}

__device__ inline Reads read4(const Step& s, int32_t position, int32_t channel) {
  Reads x{};
  if (s.finished_count)
    x.finished = load4(s.finished[0].tensor, shared_element(s, position, channel, s.finished[0].samples));
  if (s.nudge) x.nudge = load4(s.nudge, shared_element(s, position, channel, s.nudge_samples));
  if (s.old) x.old = load4(s.old, s.state_type, static_cast<int64_t>(position) * s.channels + channel);
  if (s.pre) x.pre = load4(s.pre, shared_element(s, position, channel, s.pre_samples));
  if (s.unpool.map && s.unpool.pool == Pool::kMax) {
    x.won = load4(s.unpool.winners, shared_element(s, position, channel, s.unpool.winners_samples));
  }
  return x;
}

// The update of four channels of one position from their accumulators; returns the largest change.
__device__ inline float update4(const Step& s, Four a, const Four& bias, const Reads& x, int32_t position,
                                int32_t sample, int32_t channel) {
  const auto add = [&](const Four& term, float gain) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a.x[j] += gain * term.x[j];
  };
  add(bias, 1.0f);
  if (s.finished_count) add(x.finished, s.finished[0].gain);
  for (int f = 1; f < s.finished_count; ++f) {
    const Finished& more = s.finished[f];
    add(load4(more.tensor, shared_element(s, position, channel, more.samples)), more.gain);
  }
  if (s.nudge) add(x.nudge, sample < s.second ? s.nudge_gain : -s.nudge_gain);
#pragma unroll
  for (int j = 0; j < 4; ++j) a.x[j] *= s.slope;
  const int64_t at = static_cast<int64_t>(position) * s.channels + channel;
  if (s.pre_out) store4(s.pre_out, at, a);
  const Dynamics<float> dynamics{s.form, s.damping, s.slope, s.lo, s.hi, s.scale};
  Four fresh;
  float change = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float next = next_state(dynamics, x.old.x[j], a.x[j], x.pre.x[j]);
    fresh.x[j] = channel + j < s.real_channels ? rounded(next, s.state_type) : 0.0f;
    change = larger(change, fabsf(fresh.x[j] - x.old.x[j]));
  }
  store4(s.fresh, s.state_type, at, fresh);
  if (s.operand) store4(s.operand, s.operand_copy, at, fresh);
  if (s.unpool.map) {
    const int32_t pixel = position - sample * (s.height * s.width);
    unpool4(s.unpool, sample, pixel / s.width, pixel % s.width, s.channels, channel, x.won, fresh);
  }
  return change;
}

template <typename G>
__global__ void __launch_bounds__(G::kThreads, 1) step_kernel(const __grid_constant__ Step s) {
  if (s.stop && stopped(s.control)) return;
  const int32_t sweep = s.control->sweeps;
  const int32_t blocks_across = (s.channels + G::kColumns - 1) / G::kColumns;
  const int32_t first_channel = blockIdx.x % blocks_across * G::kColumns;  // neighbours share positions
  const int32_t first = blockIdx.x / blocks_across * G::kRows;
  const int32_t per_sample = s.height * s.width, count = s.n * per_sample;
  const Positions positions{count, s.height, s.width, false};
  const float* tile = gemm_tile<G>(s.loops, s.loop_count, positions, first, first_channel, s.channels);

  constexpr int kLanes = G::kColumns / 4;  // threads of a position
  constexpr int kRun = G::kRows / (G::kThreads / kLanes);
  static_assert(kLanes == 16 || kLanes == 32, "a warp holds whole positions");
  const int column = threadIdx.x % kLanes * 4, channel = first_channel + column;
  const bool inside = channel < s.channels;
  const Four bias = s.bias && inside ? load4(s.bias, channel) : Four{};
  Residual<kLanes> residual(s.residual + static_cast<int64_t>(sweep) * s.n, s.scale);
  // positions whose reads are on their way at the same time: where few blocks are resident, nothing else hides them
  constexpr int kTogether = G::kRows * G::kColumns / G::kThreads >= 128 ? 4 : 2;
  static_assert(kRun % kTogether == 0);
  const int32_t run = threadIdx.x / kLanes * kRun;
  for (int i = 0; i < kRun; i += kTogether) {
    Reads reads[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int32_t position = first + run + i + j;
      if (position < count && inside) reads[j] = read4(s, position, channel);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int32_t row = run + i + j, position = first + row, sample = min(position / per_sample, s.n - 1);
      float change = 0.0f;
      if (position < count && inside) {
        const Four sum = load4(tile, staged_at<G::kColumns>(row, column));
        change = update4(s, sum, bias, reads[j], position, sample, channel);
      }
      residual.add(sample, change);
    }
  }
  residual.flush();
  if (s.finish) finish_sweep(s, sweep);
}

}  // namespace ep::cuda
