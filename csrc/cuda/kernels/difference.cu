// Differences and means of the two phases at one end of a connection, and sums over positions or parts.
#include "ep/pool.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "values.cuh"

namespace ep::cuda {
namespace {

constexpr int kLanes = 32, kGroups = 8;  // threads of a block: lanes of four channels x positions at a time
constexpr int kChannels = 4 * kLanes, kThreads = kLanes * kGroups;

// Both at the four pixels of a window, or at the position itself.
__device__ inline void store_ends(const Difference& d, int64_t at, const Four& difference, const Four& mean) {
  store4(d.difference, d.type, at, difference);
  if (d.mean) store4(d.mean, d.type, at, mean);
}

// Each phase's own winners: m +- gain d / 2 are its states, at different pixels. The difference is that of the states.
__device__ inline void live_ends(uint32_t won, uint32_t won_minus, uint32_t pixel, float gain, float& difference,
                                 float& mean) {
  const float plus = share_of(won, pixel, mean + 0.5f * gain * difference);
  const float minus = share_of(won_minus, pixel, mean - 0.5f * gain * difference);
  // the same pixel in both: the difference itself, no digit of it is lost
  difference = won == pixel && won_minus == pixel ? gain * difference : plus - minus;
  mean = 0.5f * (plus + minus);
}

__device__ inline void store_windows(const Difference& d, int32_t position, int32_t channel, const Four& difference,
                                     const Four& mean) {
  const int32_t w = position % d.width, h = position / d.width % d.height, n = position / (d.width * d.height);
  const int64_t corner =
      ((static_cast<int64_t>(n) * d.map_height + 2 * h) * d.map_width + 2 * w) * d.channels + channel;
  const bool live = d.winners_samples > d.n;
  uint32_t won = 0, won_minus = 0;
  if (d.pool == Pool::kMax) {
    const int64_t at = static_cast<int64_t>(position) * d.channels + channel;
    won = load4(d.winners, at);
    if (live) won_minus = load4(d.winners, at + static_cast<int64_t>(d.n) * d.height * d.width * d.channels);
  }
#pragma unroll
  for (uint32_t pixel = 0; pixel < 4; ++pixel) {
    Four out, centre;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out.x[j] = difference.x[j];
      centre.x[j] = mean.x[j];
      const uint32_t winner = won >> 8 * j & 0xff;
      if (d.pool == Pool::kAvg) {
        out.x[j] = average_share(out.x[j]);
        centre.x[j] = average_share(centre.x[j]);
      } else if (live) {
        live_ends(winner, won_minus >> 8 * j & 0xff, pixel, d.gain, out.x[j], centre.x[j]);
      } else {
        out.x[j] = share_of(winner, pixel, out.x[j]);
        centre.x[j] = share_of(winner, pixel, centre.x[j]);
      }
    }
    store_ends(d, corner + (static_cast<int64_t>(pixel >> 1) * d.map_width + (pixel & 1)) * d.channels, out, centre);
  }
}

__global__ void __launch_bounds__(kThreads) difference_kernel(const __grid_constant__ Difference d) {
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int32_t across = (d.channels + kChannels - 1) / kChannels;
  const int32_t channel = blockIdx.x % across * kChannels + 4 * lane, block = blockIdx.x / across;
  const int32_t positions = d.n * d.height * d.width;
  Four total{};
  if (channel < d.channels) {
    for (int64_t p = static_cast<int64_t>(block) * kGroups + group; p < positions; p += d.blocks * kGroups) {
      const int64_t at = p * d.channels + channel;
      const Four free = load4(d.free, d.free_type, at), plus = load4(d.delta, d.delta_type, at);
      Four minus{}, difference, mean;
      if (d.phases == 2) minus = load4(d.delta, d.delta_type, at + static_cast<int64_t>(positions) * d.channels);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        difference_and_mean(free.x[j], plus.x[j], minus.x[j], 1.0f, d.mean_gain, difference.x[j], mean.x[j]);
        total.x[j] += difference.x[j];
      }
      if (d.pool == Pool::kNone) {
        store_ends(d, at, difference, mean);
      } else {
        store_windows(d, static_cast<int32_t>(p), channel, difference, mean);
      }
    }
  }
  if (!d.sums) return;
  float* shared = reinterpret_cast<float*>(ptx::shared_memory());  // [groups, channels]: summed in their order
  store4(shared, group * kChannels + 4 * lane, total);
  __syncthreads();
  if (group != 0 || channel >= d.channels) return;
  for (int g = 1; g < kGroups; ++g) {
    const Four part = load4(shared, g * kChannels + 4 * lane);
#pragma unroll
    for (int j = 0; j < 4; ++j) total.x[j] += part.x[j];
  }
  store4(d.sums, static_cast<int64_t>(block) * d.channels + channel, total);
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ Sum s) {
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  float total = 0.0f;
  for (int part = group; i < s.size && part < s.parts; part += kGroups) total += s.partial[part * s.size + i];
  float* shared = reinterpret_cast<float*>(ptx::shared_memory());
  shared[threadIdx.x] = total;
  __syncthreads();
  if (group != 0 || i >= s.size) return;
  for (int g = 1; g < kGroups; ++g) total += shared[g * kLanes + lane];
  s.out[i] = s.scale * total;
}

}  // namespace

void launch(const Difference& d, cudaStream_t stream) {
  const int64_t across = (d.channels + kChannels - 1) / kChannels;
  launch_kernel(&difference_kernel, d.blocks * across, kThreads, sizeof(float) * kGroups * kChannels, stream, d);
}

void launch(const Sum& s, cudaStream_t stream) {
  launch_kernel(&sum_kernel, blocks_for(s.size, kLanes), kThreads, sizeof(float) * kThreads, stream, s);
}

}  // namespace ep::cuda
