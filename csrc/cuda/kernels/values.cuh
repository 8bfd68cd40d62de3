// Elements in memory: float32, float16 or bfloat16, read and written as float32, four neighbouring channels at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../kernels.h"

namespace ep::cuda {

struct Four {
  float x[4];
};

__device__ inline float half_bits(uint32_t bits) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(__half(raw));
}

__device__ inline float bfloat_bits(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ inline uint32_t to_half_bits(float x) { return static_cast<__half_raw>(__float2half_rn(x)).x; }

__device__ inline uint32_t to_bfloat_bits(float x) { return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x; }

// Elements [at, at + 4) of an array; `at` is a multiple of 4.
__device__ inline Four load4(const float* data, int64_t at) {
  const float4 v = *reinterpret_cast<const float4*>(data + at);
  return {{v.x, v.y, v.z, v.w}};
}

__device__ inline void store4(float* data, int64_t at, const Four& v) {
  *reinterpret_cast<float4*>(data + at) = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
}

__device__ inline Four load4(const void* data, Type type, int64_t at) {
  if (type == Type::kFloat) return load4(static_cast<const float*>(data), at);
  const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + at);
  if (type == Type::kHalf) {
    return {{half_bits(v.x & 0xffff), half_bits(v.x >> 16), half_bits(v.y & 0xffff), half_bits(v.y >> 16)}};
  }
  return {{bfloat_bits(v.x & 0xffff), bfloat_bits(v.x >> 16), bfloat_bits(v.y & 0xffff), bfloat_bits(v.y >> 16)}};
}

__device__ inline void store4(void* data, Type type, int64_t at, const Four& v) {
  if (type == Type::kFloat) return store4(static_cast<float*>(data), at, v);
  uint2 bits;
  if (type == Type::kHalf) {
    bits = make_uint2(to_half_bits(v.x[0]) | to_half_bits(v.x[1]) << 16, to_half_bits(v.x[2]) | to_half_bits(v.x[3])
                                                                                                    << 16);
  } else {
    bits = make_uint2(to_bfloat_bits(v.x[0]) | to_bfloat_bits(v.x[1]) << 16,
                      to_bfloat_bits(v.x[2]) | to_bfloat_bits(v.x[3]) << 16);
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + at) = bits;
}

// Four winners, one in each byte.
__device__ inline uint32_t load4(const uint8_t* winners, int64_t at) {
  return *reinterpret_cast<const uint32_t*>(winners + at);
}

__device__ inline float load1(const void* data, Type type, int64_t at) {
  if (type == Type::kFloat) return static_cast<const float*>(data)[at];
  if (type == Type::kByte) return static_cast<const uint8_t*>(data)[at];
  const uint32_t bits = static_cast<const uint16_t*>(data)[at];
  return type == Type::kHalf ? half_bits(bits) : bfloat_bits(bits);
}

__device__ inline void store1(void* data, Type type, int64_t at, float v) {
  if (type == Type::kFloat) {
    static_cast<float*>(data)[at] = v;
  } else if (type == Type::kByte) {
    static_cast<uint8_t*>(data)[at] = static_cast<uint8_t>(v);
  } else {
    static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(type == Type::kHalf ? to_half_bits(v) : to_bfloat_bits(v));
  }
}

// What a value becomes in memory.
__device__ inline float rounded(float x, Type type) {
  return type == Type::kFloat ? x : type == Type::kHalf ? half_bits(to_half_bits(x)) : bfloat_bits(to_bfloat_bits(x));
}

// The element of a tensor of fewer samples: `position` counts those of the launch, `per_sample` of them a sample.
__device__ inline int32_t shared_position(int32_t position, int32_t per_sample, int32_t samples, int32_t n) {
  return samples == n ? position : position % (per_sample * samples);
}

__device__ inline bool stopped(const Control* control) {
  return control != nullptr && *static_cast<const volatile int32_t*>(&control->stop) != 0;
}

}  // namespace ep::cuda
