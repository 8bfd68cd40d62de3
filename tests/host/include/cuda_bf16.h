// bfloat16 as CUDA has it: 16 bits, and conversions that round to nearest even.
#pragma once

#include "cuda_host.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  __nv_bfloat16(__nv_bfloat16_raw raw) : bits(raw.x) {}
  operator __nv_bfloat16_raw() const { return {bits}; }

  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(static_cast<uint32_t>(b.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return __nv_bfloat16_raw{static_cast<unsigned short>(nan ? 0x7fffu : rounded)};
}
