// Drive of a connection in one launch: convolution, 2x2 pooling, winners, unpooled neighbour (reference: `drive`).
#pragma once

#include "step.cuh"

namespace ep::cuda {

// Pools the four positions from `row` on of the tile, and stores what comes of it.
template <typename G>
__device__ inline void store_pooled(const Drive& d, const float* tile, int row, int column, int32_t position,
                                    int32_t channel) {
  const int64_t at = static_cast<int64_t>(position) * d.channels + channel;
  const int32_t per_sample = d.height * d.width;
  Four window[4];
#pragma unroll
  for (int pixel = 0; pixel < 4; ++pixel) window[pixel] = load4(tile, staged_at<G::kColumns>(row + pixel, column));
  uint32_t won = 0;
  if (d.winners) {
    won = load4(
        d.winners,
        static_cast<int64_t>(shared_position(position, per_sample, d.winners_samples, d.n)) * d.channels + channel);
  }
  Four pooled;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float z0 = window[0].x[j], z1 = window[1].x[j], z2 = window[2].x[j], z3 = window[3].x[j];
    float z;
    if (d.pool == Pool::kAvg) {
      z = average(z0, z1, z2, z3);
    } else if (d.winners) {
      z = gathered(won >> 8 * j & 0xff, z0, z1, z2, z3);
    } else {
      int32_t index = 0;
      z = largest(z0, z1, z2, z3, index);
      won |= static_cast<uint32_t>(index) << 8 * j;
    }
    pooled.x[j] = d.gain * z;
  }
  store4(d.drive, at, pooled);
  if (d.winners_out) *reinterpret_cast<uint32_t*>(d.winners_out + at) = won;
  if (d.unpool.map) {
    const int32_t sample = position / per_sample, pixel = position - sample * per_sample;
    unpool4(d.unpool, sample, pixel / d.width, pixel % d.width, d.channels, channel, won,
            load4(d.state, d.state_type, at));
  }
}

template <typename G>
__global__ void __launch_bounds__(G::kThreads, 1) drive_kernel(const __grid_constant__ Drive d) {
  if (d.stop && stopped(d.control)) return;
  const bool pools = d.pool != Pool::kNone;
  const int32_t blocks_across = (d.channels + G::kColumns - 1) / G::kColumns;
  const int32_t first_channel = blockIdx.x % blocks_across * G::kColumns;
  const int32_t first = blockIdx.x / blocks_across * G::kRows;
  const int32_t outputs = d.n * d.height * d.width;
  const Positions positions{pools ? 4 * outputs : outputs, d.height, d.width, pools};
  const float* tile = gemm_tile<G>(&d.loop, 1, positions, first, first_channel, d.channels);

  constexpr int kLanes = G::kColumns / 4;
  const int column = threadIdx.x % kLanes * 4, channel = first_channel + column;
  if (channel >= d.channels) return;
  const int pixels = pools ? 4 : 1;
  for (int row = threadIdx.x / kLanes; row < G::kRows / pixels; row += G::kThreads / kLanes) {
    const int32_t position = first / pixels + row;
    if (position >= outputs) return;
    if (pools) {
      store_pooled<G>(d, tile, 4 * row, column, position, channel);
    } else {
      Four z = load4(tile, staged_at<G::kColumns>(row, column));
#pragma unroll
      for (float& x : z.x) x *= d.gain;
      store4(d.drive, static_cast<int64_t>(position) * d.channels + channel, z);
    }
  }
}

}  // namespace ep::cuda
