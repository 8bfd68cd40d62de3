// Copies between tensors and padded buffers, sums of addends, unpooled maps, and the settling of a stopped run.
#include <algorithm>

#include "launch.cuh"
#include "unpool.cuh"

namespace ep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;  // of one copy

__device__ inline int64_t copy_count(const Copy& c) {
  return static_cast<int64_t>(c.size[0]) * c.size[1] * c.size[2] * c.size[3];
}

// Whether groups of four along the last dimension are dense and aligned on both sides.
__device__ inline bool by_fours(const Copy& c) {
  const bool strides =
      c.from_stride[3] == 1 && c.from_stride[0] % 4 == 0 && c.from_stride[1] % 4 == 0 && c.from_stride[2] % 4 == 0;
  const uintptr_t both = reinterpret_cast<uintptr_t>(c.from) | reinterpret_cast<uintptr_t>(c.to);
  return strides && c.size[3] % 4 == 0 && c.limit[3] % 4 == 0 && both % 16 == 0 && c.from_type != Type::kByte &&
         c.to_type != Type::kByte;
}

// Offset of a destination element in the source, or -1 beyond its limits.
template <typename Index>
__device__ inline int64_t source_of(const Copy& c, Index i) {
  int64_t offset = 0;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    const Index size = static_cast<Index>(c.size[d]), at = i % size;
    i /= size;
    if (at >= static_cast<Index>(c.limit[d])) return -1;
    offset += static_cast<int64_t>(at) * c.from_stride[d];
  }
  return offset;
}

// Elements from `first` on, `stride` threads apart. Index: what divides faster, where it reaches.
template <typename Index>
__device__ inline void copy_elements(const Copy& c, int64_t first, int64_t stride) {
  const int64_t count = copy_count(c);
  if (by_fours(c)) {
    for (int64_t i = 4 * first; i < count; i += 4 * stride) {
      const int64_t from = source_of(c, static_cast<Index>(i));
      store4(c.to, c.to_type, i, from < 0 ? Four{} : load4(c.from, c.from_type, from));
    }
    return;
  }
  for (int64_t i = first; i < count; i += stride) {
    const int64_t from = source_of(c, static_cast<Index>(i));
    store1(c.to, c.to_type, i, from < 0 ? 0.0f : load1(c.from, c.from_type, from));
  }
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ Copies copies) {
  const int32_t blocks = gridDim.x / copies.count;  // of each copy
  const Copy& c = copies.copy[blockIdx.x / blocks];
  const int64_t first = static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(blocks) * kThreads;
  if (copy_count(c) >> 32 == 0) {
    copy_elements<uint32_t>(c, first, stride);
  } else {
    copy_elements<uint64_t>(c, first, stride);
  }
}

__global__ void __launch_bounds__(kThreads) accumulate_kernel(const __grid_constant__ Accumulate a) {
  if (stopped(a.control)) return;
  const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (i >= a.n * a.size) return;
  const Four x = load4(a.in, a.type, i % (a.samples * a.size));
  Four out{};
  if (a.add) out = load4(a.out, i);
#pragma unroll
  for (int j = 0; j < 4; ++j) out.x[j] += a.gain * x.x[j];
  store4(a.out, i, out);
}

__global__ void __launch_bounds__(kThreads) unpool_kernel(const __grid_constant__ UnpoolState u) {
  if (stopped(u.control)) return;
  const uint32_t groups = u.channels / 4, i = blockIdx.x * kThreads + threadIdx.x;
  const int32_t per_sample = u.height * u.width;
  if (i >= static_cast<int64_t>(u.n) * per_sample * groups) return;
  const int32_t position = i / groups, channel = i % groups * 4;
  const int32_t sample = position / per_sample, pixel = position - sample * per_sample;
  uint32_t won = 0;
  if (u.unpool.pool == Pool::kMax) {
    const int32_t at = shared_position(position, per_sample, u.unpool.winners_samples, u.n);
    won = load4(u.unpool.winners, static_cast<int64_t>(at) * u.channels + channel);
  }
  unpool4(u.unpool, sample, pixel / u.width, pixel % u.width, u.channels, channel, won,
          load4(u.state, u.type, int64_t{4} * i));
}

__global__ void __launch_bounds__(kThreads) settle_kernel(const __grid_constant__ Settle s) {
  if (s.control->sweeps % 2 == s.parity) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (16 * i < s.bytes) static_cast<uint4*>(s.to)[i] = static_cast<const uint4*>(s.from)[i];
}

}  // namespace

void launch(const Copies& copies, cudaStream_t stream) {
  int64_t most = 0;
  for (int i = 0; i < copies.count; ++i) {
    const Copy& c = copies.copy[i];
    most = std::max(most, static_cast<int64_t>(c.size[0]) * c.size[1] * c.size[2] * c.size[3]);
  }
  const int64_t blocks = std::min<int64_t>(kMostBlocks, (most + 4 * kThreads - 1) / (4 * kThreads));
  launch_kernel(&copy_kernel, blocks * copies.count, kThreads, 0, stream, copies);
}

void launch(const Accumulate& a, cudaStream_t stream) {
  launch_kernel(&accumulate_kernel, blocks_for(a.n * a.size / 4, kThreads), kThreads, 0, stream, a);
}

void launch(const UnpoolState& u, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(u.n) * u.height * u.width * (u.channels / 4);
  launch_kernel(&unpool_kernel, blocks_for(items, kThreads), kThreads, 0, stream, u);
}

void launch(const Settle& s, cudaStream_t stream) {
  launch_kernel(&settle_kernel, blocks_for(s.bytes / 16, kThreads), kThreads, 0, stream, s);
}

}  // namespace ep::cuda
