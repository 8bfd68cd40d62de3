// Stand-ins for csrc/cuda/kernels/ptx.cuh, after the PTX ISA: "Matrix Fragments for mma.m16n8k16" (16-bit floats) and
// "m16n8k8" (tf32), "ldmatrix", "cp.async". The last lane to come does the work of the warp.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_host.h"

namespace ep::cuda::ptx {

inline unsigned char* shared_memory() { return host::shared_memory(); }

// From its issue until its wait what a copy writes is NaNs: the hardware may write at any time between.
inline void copy_async(void* shared, const void* global, bool valid) { host::copy_async(shared, global, valid); }
inline void copy_async_cached(void* shared, const void* global, bool valid) { host::copy_async(shared, global, valid); }
inline void copy_commit() { host::copy_commit(); }
template <int pending>
void copy_wait() {
  host::copy_wait(pending);
}

// ---- ldmatrix
struct Rows {
  const unsigned char* row;
  uint32_t* out;
};

template <bool transposed>
void load(uint32_t (&out)[4], const void* row) {
  const char* what = transposed ? "ldmatrix.trans" : "ldmatrix";
  host::check_shared(what, row, 16);
  Rows mine{static_cast<const unsigned char*>(row), out};
  host::collective(what, ~0u, true, &mine, [](void* const* arguments, uint32_t) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(elements[i], static_cast<Rows*>(arguments[8 * matrix + i])->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int major = lane / 4, minor = lane % 4 * 2;
        const uint32_t low = transposed ? elements[minor][major] : elements[major][minor];
        const uint32_t high = transposed ? elements[minor + 1][major] : elements[major][minor + 1];
        static_cast<Rows*>(arguments[lane])->out[matrix] = low | high << 16;
      }
    }
  });
}

inline void load_matrices(uint32_t (&out)[4], const void* row) { load<false>(out, row); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) { load<true>(out, row); }

// ---- mma
struct Fragments {
  float* acc;
  const uint32_t* a;
  uint32_t b[2];
};

// acc [16, 8] += a [16, depth] b [depth, 8], row by row; b's rows are contiguous, so that this is four vector lanes.
template <int depth>
void accumulate(void* const* arguments, const float (&a)[16][depth], const float (&b)[depth][8]) {
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int pair = 0; pair < 4; ++pair) {
      const float* acc = static_cast<Fragments*>(arguments[row % 8 * 4 + pair])->acc + row / 8 * 2;
      sum[2 * pair] = acc[0];
      sum[2 * pair + 1] = acc[1];
    }
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (int pair = 0; pair < 4; ++pair) {
      float* acc = static_cast<Fragments*>(arguments[row % 8 * 4 + pair])->acc + row / 8 * 2;
      acc[0] = sum[2 * pair];
      acc[1] = sum[2 * pair + 1];
    }
  }
}

struct HalfBits {
  static float value(uint32_t bits) { return __half2float(__half_raw{static_cast<unsigned short>(bits)}); }
};
struct BFloatBits {
  static float value(uint32_t bits) { return __uint_as_float(bits << 16); }
};

// m16n8k16: two elements in a register, neighbours in k.
template <typename Bits>
void multiply16(void* const* arguments, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Fragments*>(arguments[lane]);
    const int group = lane / 4, k = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      a[group + i % 2 * 8][k + i / 2 * 8] = Bits::value(mine.a[i] & 0xffff);
      a[group + i % 2 * 8][k + i / 2 * 8 + 1] = Bits::value(mine.a[i] >> 16);
    }
    for (int i = 0; i < 2; ++i) {
      b[k + 8 * i][group] = Bits::value(mine.b[i] & 0xffff);
      b[k + 8 * i + 1][group] = Bits::value(mine.b[i] >> 16);
    }
  }
  accumulate(arguments, a, b);
}

// m16n8k8 of tf32: the low 13 bits of an operand are not looked at.
inline void multiply8(void* const* arguments, uint32_t) {
  constexpr uint32_t seen = ~0x1fffu;
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Fragments*>(arguments[lane]);
    const int group = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][k + i / 2 * 4] = __uint_as_float(mine.a[i] & seen);
    for (int i = 0; i < 2; ++i) b[k + 4 * i][group] = __uint_as_float(mine.b[i] & seen);
  }
  accumulate(arguments, a, b);
}

inline void multiply_half(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments mine{acc, a, {b0, b1}};
  host::collective("mma.m16n8k16.f16", ~0u, true, &mine, multiply16<HalfBits>);
}

inline void multiply_bfloat(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments mine{acc, a, {b0, b1}};
  host::collective("mma.m16n8k16.bf16", ~0u, true, &mine, multiply16<BFloatBits>);
}

inline void multiply_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments mine{acc, a, {b0, b1}};
  host::collective("mma.m16n8k8.tf32", ~0u, true, &mine, multiply8);
}

// The nearest tf32, ties away from zero; infinities and NaNs as they are.
inline uint32_t round_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits & 0x007fffffu ? bits | 0x00400000u : bits;
}

}  // namespace ep::cuda::ptx

#include "host_wgmma.h"
