// Products of one warp from shared memory: tiles of 16 x 8 accumulators in the layout of mma.m16n8, for all operands.
//
// Thread t of a warp holds of each tile the rows g = t / 4 and g + 8, columns 2 (t % 4) and the next:
// acc[0], acc[1] of row g, acc[2], acc[3] of row g + 8.
#pragma once

#include "ptx.cuh"
#include "values.cuh"

namespace ep::cuda {

constexpr int kRowBytes = 64;   // of K in one stage of a K-major tile: 32 halves or 16 floats
constexpr int kStepBytes = 32;  // of K in one step: m16n8k16 of halves, m16n8k8 of tf32

// Byte offset of a 16-byte chunk in a K-major tile of rows of 64 or 128 bytes. Eight rows at one chunk lie in eight
// different groups of banks, as ldmatrix wants; rows of 128 bytes have the 128-byte swizzle that wgmma reads.
template <int row_bytes>
__device__ inline int chunk_at(int row, int chunk) {
  static_assert(row_bytes == 64 || row_bytes == 128);
  return row * row_bytes + ((chunk ^ (row_bytes == 64 ? row >> 1 & 3 : row & 7)) << 4);
}

template <Products P>
__device__ inline void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (P == Products::kHalf) {
    ptx::multiply_half(acc, a, b0, b1);
  } else if constexpr (P == Products::kBFloat) {
    ptx::multiply_bfloat(acc, a, b0, b1);
  } else {
    ptx::multiply_tf32(acc, a, b0, b1);
  }
}

template <Products P>
__device__ inline void round_operands(uint32_t (&x)[4]) {
  if constexpr (P == Products::kTf32) {
    for (uint32_t& bits : x) bits = ptx::round_tf32(bits);
  }
}

// acc += a[row.., K] b[column.., K]^T over one stage of K-major tiles, by tensor cores.
template <Products P, int M, int N>
__device__ inline void multiply_tiles(float (&acc)[M][N][4], const unsigned char* a, const unsigned char* b, int row,
                                      int column) {
  const int lane = threadIdx.x & 31;
  const int a_row = row + (lane & 15), a_chunk = lane >> 4;
  const int b_row = column + (lane & 7) + (lane >> 4 << 3), b_chunk = lane >> 3 & 1;
#pragma unroll
  for (int step = 0; step < kRowBytes / kStepBytes; ++step) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      ptx::load_matrices(left[m], a + chunk_at<kRowBytes>(a_row + 16 * m, 2 * step + a_chunk));
      round_operands<P>(left[m]);
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      ptx::load_matrices(right, b + chunk_at<kRowBytes>(b_row + 8 * n, 2 * step + b_chunk));
      round_operands<P>(right);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<P>(acc[m][n], left[m], right[0], right[1]);
        multiply<P>(acc[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The same in float32, for exactness: the layout of the accumulators is that of the tensor cores.
template <int M, int N>
__device__ inline void multiply_tiles_float(float (&acc)[M][N][4], const unsigned char* a, const unsigned char* b,
                                            int row, int column) {
  const int lane = threadIdx.x & 31;
  const int a_row = row + lane / 4, b_row = column + lane % 4 * 2;
#pragma unroll 1
  for (int chunk = 0; chunk < kRowBytes / 16; ++chunk) {
    float4 left[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        left[m][half] = *reinterpret_cast<const float4*>(a + chunk_at<kRowBytes>(a_row + 16 * m + 8 * half, chunk));
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const float4 right = *reinterpret_cast<const float4*>(b + chunk_at<kRowBytes>(b_row + 8 * n + next, chunk));
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& sum = acc[m][n][2 * half + next];
            sum += left[m][half].x * right.x;
            sum += left[m][half].y * right.y;
            sum += left[m][half].z * right.z;
            sum += left[m][half].w * right.w;
          }
        }
      }
    }
  }
}

template <int M, int N>
__device__ inline void scale(float (&acc)[M][N][4], float factor) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] *= factor;
    }
  }
}

// Index of an element of an accumulator tile in shared memory, [rows, columns] floats. The fragments' stores of two and
// the epilogue's loads of four neighbours are free of bank conflicts.
template <int columns>
__device__ inline int staged_at(int row, int column) {
  return row * columns + (column ^ (row & 3) << 3);
}

// Puts a warp's accumulators at (row, column) of the block's tile.
template <int columns, int M, int N>
__device__ inline void stage(const float (&acc)[M][N][4], float* tile, int row, int column) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = staged_at<columns>(row + 16 * m + 8 * half + lane / 4, column + 8 * n + lane % 4 * 2);
        *reinterpret_cast<float2*>(tile + at) = make_float2(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
    }
  }
}

}  // namespace ep::cuda
