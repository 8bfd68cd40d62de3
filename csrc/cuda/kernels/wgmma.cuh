// The same implicit GEMM on wgmma (sm_90a): warpgroups multiply straight from shared memory, while the next stages
// arrive.
#pragma once

#include "mainloop.cuh"

namespace ep::cuda {

// A tile of BM positions x 128 matrix rows; each of two warpgroups has half of the positions.
template <Products P, int BM, int kStages>
struct WarpgroupGemm {
  static_assert(P == Products::kHalf || P == Products::kBFloat);
  static constexpr Products kProducts = P;
  static constexpr bool kWarpgroup = true;
  static constexpr int kRows = BM, kColumns = 128, kThreads = 256;
  static constexpr int kElement = 2;
  static constexpr int kKBytes = 128;  // of K in a stage: the rows of the 128-byte swizzle
  static constexpr int kDepth = kKBytes / kElement;
  static constexpr int kStageBytes = (kRows + kColumns) * kKBytes;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kTileBytes = kRows * kColumns * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kTileBytes ? kPipelineBytes : kTileBytes;
  static constexpr int kChunks = kKBytes / 16;
  static constexpr int kRowsApart = kThreads / kChunks;
  static constexpr int kARows = kRows / kRowsApart, kBRows = kColumns / kRowsApart;
  static constexpr int M = BM / 128;  // blocks of 64 positions of a warpgroup
};

template <Products P>
__device__ inline void multiply_warpgroup(float (&acc)[16][4], uint64_t a, uint64_t b) {
  if constexpr (P == Products::kHalf) {
    ptx::multiply_warpgroup_half(acc, a, b);
  } else {
    ptx::multiply_warpgroup_bfloat(acc, a, b);
  }
}

// As `gemm_tile` in mainloop.cuh.
template <typename G, std::enable_if_t<G::kWarpgroup, int> = 0>
__device__ inline float* gemm_tile(const Loop* loops, int count, const Positions& positions, int32_t first_position,
                                   int32_t first_row, int32_t rows) {
  unsigned char* shared = ptx::shared_memory();
  constexpr int kStages = G::kPipelineBytes / G::kStageBytes;
  const int group = threadIdx.x / 128;
  const int row = group * 64 * G::M;
  float acc[G::M][1][16][4];
#pragma unroll
  for (int m = 0; m < G::M; ++m) {
#pragma unroll
    for (int n = 0; n < 16; ++n) acc[m][0][n][0] = acc[m][0][n][1] = acc[m][0][n][2] = acc[m][0][n][3] = 0.0f;
  }
  Fetch<G> fetch(loops, count, positions, first_position, first_row, rows);
  // Two stages are not on their way: the one that is multiplied, and the one before it, whose products may be
  // unfinished.
#pragma unroll 1  // a fetch is long code
  for (int s = 0; s < kStages - 2; ++s) {
    fetch(shared + s * G::kStageBytes);
    ptx::copy_commit();
  }
  int stage_read = 0, stage_written = kStages - 2;
  for (int l = 0; l < count; ++l) {
    for (int left = stages_of<G>(loops[l]); left > 0; --left) {
      ptx::copy_wait<kStages - 3>();
      ptx::publish_shared();
      __syncthreads();  // this stage is there for all, and all products of the one that is written next are done
      const unsigned char* a = shared + stage_read * G::kStageBytes + row * G::kKBytes;
      const unsigned char* b = shared + stage_read * G::kStageBytes + G::kRows * G::kKBytes;
      ptx::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < G::kKBytes; k += kStepBytes) {
#pragma unroll
        for (int m = 0; m < G::M; ++m) {
          multiply_warpgroup<G::kProducts>(acc[m][0], ptx::describe(a + m * 64 * G::kKBytes + k), ptx::describe(b + k));
        }
      }
      ptx::warpgroup_commit();
      fetch(shared + stage_written * G::kStageBytes);
      ptx::copy_commit();
      ptx::warpgroup_wait<1>();
      stage_read = stage_read + 1 == kStages ? 0 : stage_read + 1;
      stage_written = stage_written + 1 == kStages ? 0 : stage_written + 1;
    }
    ptx::warpgroup_wait<0>();
#pragma unroll
    for (int m = 0; m < G::M; ++m) scale(acc[m], loops[l].after);
  }
  ptx::copy_wait<0>();
  __syncthreads();
  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < G::M; ++m) stage<G::kColumns>(acc[m], tile, row + 64 * m + threadIdx.x / 32 % 4 * 16, 0);
  __syncthreads();
  return tile;
}

}  // namespace ep::cuda
