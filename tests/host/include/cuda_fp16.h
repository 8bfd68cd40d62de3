// float16 as CUDA has it: 16 bits, and conversions that round to nearest even.
#pragma once

#include "cuda_host.h"

struct __half_raw {
  unsigned short x;
};

struct __half {
  __half() = default;
  __half(__half_raw raw) : bits(raw.x) {}
  operator __half_raw() const { return {bits}; }

  unsigned short bits;
};

// The exponent's bias is put right by a multiplication, which also normalises subnormals.
inline float __half2float(__half h) {
  const uint32_t magnitude = (h.bits & 0x7fffu) << 13;
  const uint32_t scaled = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  return __uint_as_float(scaled | special | (h.bits & 0x8000u) << 16);
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const auto made = [](uint32_t half) { return __half(__half_raw{static_cast<unsigned short>(half)}); };
  if (magnitude > 0x7f800000u) return made(0x7fffu);
  if (magnitude >= 0x477ff000u) return made(sign | 0x7c00u);  // 65520 and more
  if (magnitude < 0x38800000u) {                              // below 2^-14: adding 1/2 leaves multiples of 2^-24
    return made(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t even = magnitude >> 13 & 1;
  return made(sign | ((magnitude - 0x38000000u + 0xfffu + even) >> 13));
}
