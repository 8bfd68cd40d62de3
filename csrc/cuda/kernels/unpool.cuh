// P^-1: where the four pixels of a window lie, and what each gets.
#pragma once

#include "ep/pool.h"
#include "values.cuh"

namespace ep::cuda {

// P^-1 of four channels of a state at one position: the window's pixels.
__device__ inline void unpool4(const Unpool& u, int32_t n, int32_t h, int32_t w, int32_t channels, int32_t channel,
                               uint32_t won, const Four& state) {
  const int64_t corner = ((static_cast<int64_t>(n) * u.height + 2 * h) * u.width + 2 * w) * channels + channel;
#pragma unroll
  for (int pixel = 0; pixel < 4; ++pixel) {
    Four out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.x[i] = u.pool == Pool::kAvg ? average_share(state.x[i]) : share_of(won >> 8 * i & 0xff, pixel, state.x[i]);
    }
    store4(u.map, u.type, corner + (static_cast<int64_t>(pixel >> 1) * u.width + (pixel & 1)) * channels, out);
  }
}

}  // namespace ep::cuda
