// Implicit GEMM on mma.sync: acc[position, row] = sum over K loops of patches of a map times a K-major matrix.
//
// All K loops of a step run through one pipeline of kStages stages in shared memory, which then holds the result.
#pragma once

#include "fetch.cuh"

namespace ep::cuda {

// A tile of BM positions x BN matrix rows, of which a warp multiplies WM x WN.
template <Products P, int BM, int BN, int WM, int WN, int kStages>
struct Gemm {
  static constexpr Products kProducts = P;
  static constexpr bool kWarpgroup = false;
  static constexpr int kRows = BM, kColumns = BN;
  static constexpr int kThreads = BM / WM * (BN / WN) * 32;
  static constexpr int kElement = P == Products::kHalf || P == Products::kBFloat ? 2 : 4;
  static constexpr int kKBytes = kRowBytes;          // of K in a stage, a row of its tiles
  static constexpr int kDepth = kKBytes / kElement;  // the same in elements
  static constexpr int kStageBytes = (BM + BN) * kKBytes;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kTileBytes = BM * BN * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kTileBytes ? kPipelineBytes : kTileBytes;
  static constexpr int kChunks = kKBytes / 16;
  static constexpr int kRowsApart = kThreads / kChunks;  // a thread fetches one chunk of every kRowsApart-th row
  static constexpr int kARows = BM / kRowsApart, kBRows = BN / kRowsApart;
  static constexpr int M = WM / 16, N = WN / 8;
  static_assert(BM % kRowsApart == 0 && BN % kRowsApart == 0 && BN % 32 == 0 && N % 2 == 0);
};

// The whole tile, [kRows, kColumns] floats at the beginning of shared memory (staged_at), visible to all threads.
template <typename G, std::enable_if_t<!G::kWarpgroup, int> = 0>
__device__ inline float* gemm_tile(const Loop* loops, int count, const Positions& positions, int32_t first_position,
                                   int32_t first_row, int32_t rows) {
  unsigned char* shared = ptx::shared_memory();
  constexpr int kStages = G::kPipelineBytes / G::kStageBytes;
  const int warp = threadIdx.x / 32;
  constexpr int kWarpsDown = G::kRows / (16 * G::M);
  const int row = warp % kWarpsDown * 16 * G::M, column = warp / kWarpsDown * 8 * G::N;
  float acc[G::M][G::N][4];
#pragma unroll
  for (int m = 0; m < G::M; ++m) {
#pragma unroll
    for (int n = 0; n < G::N; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
  }
  Fetch<G> fetch(loops, count, positions, first_position, first_row, rows);
#pragma unroll 1  // a fetch is long code
  for (int s = 0; s < kStages - 1; ++s) {
    fetch(shared + s * G::kStageBytes);
    ptx::copy_commit();  // a group for every stage, even an empty one: the waits below count them
  }
  int stage_read = 0, stage_written = kStages - 1;
  for (int l = 0; l < count; ++l) {
    for (int left = stages_of<G>(loops[l]); left > 0; --left) {
      ptx::copy_wait<kStages - 2>();
      __syncthreads();  // everyone's part of this stage is there, and everyone has read the one that is written next
      fetch(shared + stage_written * G::kStageBytes);
      ptx::copy_commit();
      const unsigned char* a = shared + stage_read * G::kStageBytes;
      const unsigned char* b = a + G::kRows * G::kKBytes;
      if constexpr (G::kProducts == Products::kFloat) {
        multiply_tiles_float<G::M, G::N>(acc, a, b, row, column);
      } else {
        multiply_tiles<G::kProducts, G::M, G::N>(acc, a, b, row, column);
      }
      stage_read = stage_read + 1 == kStages ? 0 : stage_read + 1;
      stage_written = stage_written + 1 == kStages ? 0 : stage_written + 1;
    }
    scale(acc, loops[l].after);
  }
  ptx::copy_wait<0>();
  __syncthreads();  // the stages have been read: the accumulators take their place
  float* tile = reinterpret_cast<float*>(shared);
  stage<G::kColumns>(acc, tile, row, column);
  __syncthreads();
  return tile;
}

}  // namespace ep::cuda
