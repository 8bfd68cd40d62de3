// CUDA's C++ for a host compiler: its words, the intrinsics that kernels use, and the launch. A block's threads are
// fibers (tests/host/host.cpp); each runs until it waits for others, so one CPU thread runs them all and plain loads
// and stores are atomic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

extern uint3 threadIdx, blockIdx;  // of the running fiber
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace ep::cuda::host {

// Waits for every thread of the block; returns how many of them came with a nonzero predicate.
int barrier(const char* what, bool predicate);

// Waits for the lanes of `mask`, then the last to come calls finish(arguments, mask) for all, where arguments[lane] is
// what that lane brought, and may be written. `aligned`: the whole warp must take part.
using Finish = void (*)(void* const* arguments, uint32_t mask);
void collective(const char* what, uint32_t mask, bool aligned, void* argument, Finish finish);

// Dynamic shared memory of the block, aligned to 1024, NaNs at its start.
unsigned char* shared_memory();
// Raises unless [data, data + bytes) is shared memory of this block at an address aligned to `bytes`.
void check_shared(const char* what, const void* data, size_t bytes);
// Raises with the kernel, block and thread.
[[noreturn]] void fail(const char* message);

// A thread's asynchronous copies (host_ptx.h).
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(int pending);

struct Launch {
  const void* key;
  unsigned grid, block;
  size_t shared;
  std::function<void()> thread;  // what each thread runs
};
void issue(cudaStream_t stream, Launch launch);

// <<<grid, block, shared, stream>>>. A launch that CUDA would refuse sets cudaGetLastError; an error of a thread
// raises.
template <typename P>
void launch(const void* key, void (*kernel)(P), unsigned grid, unsigned block, size_t shared, cudaStream_t stream,
            const P& params) {
  issue(stream, {key, grid, block, shared, [kernel, params] { kernel(params); }});
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
struct Exchange {
  T value, result;
  int from;  // lane
};

// Each lane of the mask gets the value of its lane `from`; of a lane that takes no part, ones in every bit.
template <typename T>
T exchange(const char* what, uint32_t mask, T value, int from) {
  static_assert(std::is_trivially_copyable_v<T>);
  Exchange<T> mine{value, value, from};
  collective(what, mask, false, &mine, [](void* const* arguments, uint32_t lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      auto& to = *static_cast<Exchange<T>*>(arguments[lane]);
      if (lanes >> to.from & 1) {
        to.result = static_cast<Exchange<T>*>(arguments[to.from])->value;
      } else {
        std::memset(&to.result, 0xff, sizeof to.result);
      }
    }
  });
  return mine.result;
}

struct Ballot {
  bool predicate;
  uint32_t result;
};

inline Ballot ballot(const char* what, uint32_t mask, bool predicate) {
  Ballot mine{predicate, 0};
  collective(what, mask, false, &mine, [](void* const* arguments, uint32_t lanes) {
    uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) result |= static_cast<uint32_t>(static_cast<Ballot*>(arguments[lane])->predicate) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) static_cast<Ballot*>(arguments[lane])->result = result;
    }
  });
  return mine;
}

inline int lane() { return static_cast<int>(threadIdx.x & 31); }

}  // namespace ep::cuda::host

// ---- synchronisation
inline void __syncthreads() { ep::cuda::host::barrier("__syncthreads", false); }
inline int __syncthreads_count(int x) { return ep::cuda::host::barrier("__syncthreads_count", x != 0); }
inline int __syncthreads_or(int x) { return ep::cuda::host::barrier("__syncthreads_or", x != 0) != 0; }
inline int __syncthreads_and(int x) { return ep::cuda::host::barrier("__syncthreads_and", x == 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u) {
  ep::cuda::host::collective("__syncwarp", mask, false, nullptr, [](void* const*, uint32_t) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warps (PTX ISA: shfl.sync, vote.sync)
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int first = ep::cuda::host::lane() & -width;
  return ep::cuda::host::exchange("__shfl_sync", mask, value, first + (from & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = ep::cuda::host::lane(), from = lane ^ bits;
  return ep::cuda::host::exchange("__shfl_xor_sync", mask, value, from > (lane | (width - 1)) ? lane : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = ep::cuda::host::lane(), from = lane + static_cast<int>(by);
  return ep::cuda::host::exchange("__shfl_down_sync", mask, value, from > (lane | (width - 1)) ? lane : from);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = ep::cuda::host::lane(), from = lane - static_cast<int>(by);
  return ep::cuda::host::exchange("__shfl_up_sync", mask, value, from < (lane & -width) ? lane : from);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  return ep::cuda::host::ballot("__ballot_sync", mask, x != 0).result;
}
inline int __any_sync(unsigned mask, int x) { return ep::cuda::host::ballot("__any_sync", mask, x != 0).result != 0; }
inline int __all_sync(unsigned mask, int x) { return ep::cuda::host::ballot("__all_sync", mask, x == 0).result == 0; }

// ---- atomics
template <typename T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <typename T>
T atomicMax(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = old < value ? value : old;
  return old;
}

// ---- numbers
inline int __float_as_int(float x) { return ep::cuda::host::bits_as<int>(x); }
inline float __int_as_float(int x) { return ep::cuda::host::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return ep::cuda::host::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return ep::cuda::host::bits_as<float>(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
T min(T a, std::common_type_t<T> b) {
  return b < a ? b : a;
}
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
T max(T a, std::common_type_t<T> b) {
  return a < b ? b : a;
}
