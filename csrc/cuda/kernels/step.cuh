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
  __device__ explicit Residual(int32_t* row) : row_(row) {}

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
    if (sample_ >= 0 && threadIdx.x % kLanes == 0) atomicMax(row_ + sample_, most_);
  }

 private:
  int32_t* row_;
  int32_t sample_ = -1, most_ = 0;
};

// The last block of a sweep's last launch counts the sweep, and decides whether the relaxation has come to rest.
__device__ inline void finish_sweep(const Step& s, int32_t sweep) {
  __shared__ int32_t last;
  __threadfence();  // this thread's residuals are out before its block's ticket
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&s.control->ticket, 1) == static_cast<int32_t>(gridDim.x) - 1;
  __syncthreads();
  if (!last) return;
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

// The update of four channels of one position from their accumulators; returns the largest change.
__device__ inline float update4(const Step& s, Four a, int32_t position, int32_t sample, int32_t channel) {
  const int32_t per_sample = s.height * s.width;
  const auto element = [&](int32_t p) { return static_cast<int64_t>(p) * s.channels + channel; };
  const auto shared = [&](int32_t samples) { return element(shared_position(position, per_sample, samples, s.n)); };
  const auto add = [&](const Four& x, float gain) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a.x[j] += gain * x.x[j];
  };
  const int64_t at = element(position);
  if (s.bias) add(load4(s.bias, channel), 1.0f);
  for (int f = 0; f < s.finished_count; ++f) {
    add(load4(s.finished[f].tensor, shared(s.finished[f].samples)), s.finished[f].gain);
  }
  if (s.nudge) add(load4(s.nudge, shared(s.nudge_samples)), sample < s.second ? s.nudge_gain : -s.nudge_gain);
#pragma unroll
  for (int j = 0; j < 4; ++j) a.x[j] *= s.slope;
  if (s.pre_out) store4(s.pre_out, at, a);
  const Four old = s.old ? load4(s.old, s.state_type, at) : Four{};
  const Four pre = s.pre ? load4(s.pre, shared(s.pre_samples)) : Four{};
  const Dynamics<float> dynamics{s.form, s.damping, s.slope, s.lo, s.hi, s.scale};
  Four fresh;
  float change = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float next = next_state(dynamics, old.x[j], a.x[j], pre.x[j]);
    fresh.x[j] = channel + j < s.real_channels ? rounded(next, s.state_type) : 0.0f;
    change = larger(change, fabsf(fresh.x[j] - old.x[j]) / s.scale);
  }
  store4(s.fresh, s.state_type, at, fresh);
  if (s.operand) store4(s.operand, s.operand_copy, at, fresh);
  if (s.unpool.map) {
    const int32_t pixel = position - sample * per_sample;
    const uint32_t won = s.unpool.pool == Pool::kMax ? load4(s.unpool.winners, shared(s.unpool.winners_samples)) : 0;
    unpool4(s.unpool, sample, pixel / s.width, pixel % s.width, s.channels, channel, won, fresh);
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
  Residual<kLanes> residual(s.residual + static_cast<int64_t>(sweep) * s.n);
  for (int i = 0; i < kRun; ++i) {
    const int row = threadIdx.x / kLanes * kRun + i;
    const int32_t position = first + row, sample = min(position / per_sample, s.n - 1);
    float change = 0.0f;
    if (position < count && channel < s.channels) {
      const float4 sum = *reinterpret_cast<const float4*>(tile + staged_at<G::kColumns>(row, column));
      change = update4(s, {{sum.x, sum.y, sum.z, sum.w}}, position, sample, channel);
    }
    residual.add(sample, change);
  }
  residual.flush();
  if (s.finish) finish_sweep(s, sweep);
}

}  // namespace ep::cuda
