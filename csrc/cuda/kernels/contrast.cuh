// Contrastive weight gradients of one connection (reference: `contrast`): positions are the K of this GEMM.
#pragma once

#include "mainloop.cuh"

namespace ep::cuda {

// Tiles [positions, channels] of both maps, as they lie in memory: the products read them transposed.
template <Products P, int BM, int BN, int WM, int WN, int kStages>
struct Correlation {
  static constexpr Products kProducts = P;
  static constexpr int kRows = BM, kColumns = BN, kThreads = BM / WM * (BN / WN) * 32;
  static constexpr int kElement = P == Products::kHalf || P == Products::kBFloat ? 2 : 4;
  static constexpr int kPositions = kRowBytes / kElement;  // K of a stage
  static constexpr int kABytes = BM * kRowBytes, kStageBytes = (BM + BN) * kRowBytes;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kTileBytes = BM * BN * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kTileBytes ? kPipelineBytes : kTileBytes;
  static constexpr int M = WM / 16, N = WN / 8;
};

// Byte offset of a 16-byte chunk in a tile of positions of `width` bytes. Transposing loads of 16-bit elements take
// eight positions at once, loads of single floats four.
template <Products P>
__device__ inline int transposed_at(int position, int chunk, int width) {
  constexpr bool k16 = P == Products::kHalf || P == Products::kBFloat;
  const int turned = chunk ^ (k16 ? position & 7 : (position & 3) << 1);
  return position * width + (turned << 4);
}

// acc[row, column] += sum over the stage's positions of a[position, row] b[position, column].
template <typename C>
__device__ inline void correlate_tiles(float (&acc)[C::M][C::N][4], const unsigned char* a, const unsigned char* b,
                                       int row, int column) {
  constexpr Products P = C::kProducts;
  constexpr int kAWidth = C::kRows * C::kElement, kBWidth = C::kColumns * C::kElement;
  const int lane = threadIdx.x & 31;
  if constexpr (P == Products::kHalf || P == Products::kBFloat) {
    const int i = lane >> 3, in = lane & 7;
#pragma unroll
    for (int k = 0; k < C::kPositions; k += 16) {
      uint32_t left[C::M][4];
#pragma unroll
      for (int m = 0; m < C::M; ++m) {
        ptx::load_matrices_transposed(
            left[m], a + transposed_at<P>(k + in + (i >> 1 << 3), (row + 16 * m) / 8 + (i & 1), kAWidth));
      }
#pragma unroll
      for (int n = 0; n < C::N; n += 2) {
        uint32_t right[4];
        ptx::load_matrices_transposed(
            right, b + transposed_at<P>(k + in + ((i & 1) << 3), (column + 8 * n) / 8 + (i >> 1), kBWidth));
#pragma unroll
        for (int m = 0; m < C::M; ++m) {
          multiply<P>(acc[m][n], left[m], right[0], right[1]);
          multiply<P>(acc[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  } else {
    const auto bits = [](const unsigned char* tile, int position, int channel, int width) {
      return *reinterpret_cast<const uint32_t*>(tile + transposed_at<P>(position, channel >> 2, width) +
                                                (channel & 3) * 4);
    };
    const int g = lane / 4, t = lane % 4;
    if constexpr (P == Products::kTf32) {
#pragma unroll
      for (int k = 0; k < C::kPositions; k += 8) {
        uint32_t left[C::M][4];
#pragma unroll
        for (int m = 0; m < C::M; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            left[m][i] = bits(a, k + t + (i >> 1 << 2), row + 16 * m + g + ((i & 1) << 3), kAWidth);
          round_operands<P>(left[m]);
        }
#pragma unroll
        for (int n = 0; n < C::N; ++n) {
          const uint32_t b0 = ptx::round_tf32(bits(b, k + t, column + 8 * n + g, kBWidth));
          const uint32_t b1 = ptx::round_tf32(bits(b, k + t + 4, column + 8 * n + g, kBWidth));
#pragma unroll
          for (int m = 0; m < C::M; ++m) multiply<P>(acc[m][n], left[m], b0, b1);
        }
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < C::kPositions; ++k) {
        float left[C::M][2];
#pragma unroll
        for (int m = 0; m < C::M; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            left[m][half] = __uint_as_float(bits(a, k, row + 16 * m + 8 * half + g, kAWidth));
        }
#pragma unroll
        for (int n = 0; n < C::N; ++n) {
#pragma unroll
          for (int next = 0; next < 2; ++next) {
            const float right = __uint_as_float(bits(b, k, column + 8 * n + 2 * t + next, kBWidth));
#pragma unroll
            for (int m = 0; m < C::M; ++m) {
#pragma unroll
              for (int half = 0; half < 2; ++half) acc[m][n][2 * half + next] += left[m][half] * right;
            }
          }
        }
      }
    }
  }
}

// One of the two products: positions of a split, at one tap.
struct Pair {
  const void* above;
  const void* below;
};

// Fetches stages of positions, one after another; past the last of a split, zeros.
template <typename C>
class FetchPositions {
 public:
  // Channels from `row` of `above`, from `column` of `below` shifted to tap (r, s); positions [first, end).
  __device__ FetchPositions(const Contrast& c, int32_t first, int32_t end, int32_t row, int32_t column, int32_t r,
                            int32_t s)
      : c_(c), first_(first), end_(end), r_(r - c.padding_h), s_(s - c.padding_w) {
    row_ = row + static_cast<int32_t>(threadIdx.x) % kAChunks * kPer;
    column_ = column + static_cast<int32_t>(threadIdx.x) % kBChunks * kPer;
    // an advance by one stage is the same for all threads: so many samples, rows and columns, and what carries
    const int32_t step_n = C::kPositions / (c.width * c.height);
    step_x_ = C::kPositions % c.width * c.stride_w;
    step_y_ = C::kPositions / c.width % c.height * c.stride_h;
    step_ = (step_n * c.below_height + step_y_) * c.below_width + step_x_;
    rewind();
  }

  // Back to the first position.
  __device__ void rewind() {
    position_ = first_;
#pragma unroll
    for (int i = 0; i < kBRows; ++i) {
      const int32_t p = first_ + static_cast<int32_t>(threadIdx.x) / kBChunks + i * kBApart;
      x_[i] = p % c_.width * c_.stride_w + s_;
      y_[i] = p / c_.width % c_.height * c_.stride_h + r_;
      pixel_[i] = (p / (c_.width * c_.height) * c_.below_height + y_[i]) * c_.below_width + x_[i];
    }
  }

  __device__ void operator()(unsigned char* stage, const Pair& pair) {
    const int a_chunk = threadIdx.x % kAChunks, a_row = threadIdx.x / kAChunks;
    const auto* above = static_cast<const unsigned char*>(pair.above) +
                        (static_cast<int64_t>(position_ + a_row) * c_.rows + row_) * C::kElement;
#pragma unroll
    for (int i = 0; i < kARows; ++i) {
      const bool valid = position_ + a_row + i * kAApart < end_ && row_ < c_.rows;
      ptx::copy_async(stage + transposed_at<C::kProducts>(a_row + i * kAApart, a_chunk, C::kRows * C::kElement),
                      above + static_cast<int64_t>(i * kAApart) * c_.rows * C::kElement, valid);
    }
    const int b_chunk = threadIdx.x % kBChunks, b_row = threadIdx.x / kBChunks;
    const auto* below = static_cast<const unsigned char*>(pair.below) + column_ * C::kElement;
    unsigned char* to = stage + C::kABytes;
#pragma unroll
    for (int i = 0; i < kBRows; ++i) {
      const bool valid = position_ + b_row + i * kBApart < end_ && column_ < c_.columns && y_[i] >= 0 &&
                         y_[i] < c_.below_height && x_[i] >= 0 && x_[i] < c_.below_width;
      ptx::copy_async(to + transposed_at<C::kProducts>(b_row + i * kBApart, b_chunk, C::kColumns * C::kElement),
                      below + static_cast<int64_t>(pixel_[i]) * c_.columns * C::kElement, valid);
      advance(i);
    }
    position_ += C::kPositions;
  }

 private:
  static constexpr int kPer = 16 / C::kElement;  // channels of a chunk
  static constexpr int kAChunks = C::kRows / kPer, kBChunks = C::kColumns / kPer;
  static constexpr int kAApart = C::kThreads / kAChunks, kBApart = C::kThreads / kBChunks;
  static constexpr int kARows = C::kPositions / kAApart, kBRows = C::kPositions / kBApart;
  static_assert(C::kThreads % kAChunks == 0 && C::kThreads % kBChunks == 0);
  static_assert(C::kPositions % kAApart == 0 && C::kPositions % kBApart == 0);

  // Row i of this thread goes on by kPositions.
  __device__ void advance(int i) {
    const int32_t across = c_.width * c_.stride_w, down = c_.height * c_.stride_h;
    x_[i] += step_x_;
    y_[i] += step_y_;
    pixel_[i] += step_;
    if (x_[i] >= across + s_) {  // into the next row of the map above
      x_[i] -= across;
      y_[i] += c_.stride_h;
      pixel_[i] += c_.stride_h * c_.below_width - across;
    }
    if (y_[i] >= down + r_) {  // into the next sample
      y_[i] -= down;
      pixel_[i] += (c_.below_height - down) * c_.below_width;
    }
  }

  const Contrast& c_;
  int32_t first_, end_, r_, s_;  // where the tap's offset to the position above it includes the padding
  int32_t row_, column_;
  int32_t step_x_, step_y_, step_;
  int32_t position_;                               // first of the next stage
  int32_t x_[kBRows], y_[kBRows], pixel_[kBRows];  // in the map below; outside it too
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) contrast_kernel(const __grid_constant__ Contrast c) {
  unsigned char* shared = ptx::shared_memory();
  constexpr int kStages = C::kPipelineBytes / C::kStageBytes;
  // columns vary fastest, then taps: neighbours read the same positions
  const int32_t across = (c.columns + C::kColumns - 1) / C::kColumns, down = (c.rows + C::kRows - 1) / C::kRows;
  const int32_t taps = c.kernel_h * c.kernel_w;
  int32_t block = blockIdx.x;
  const int32_t column = block % across * C::kColumns;
  block /= across;
  const int32_t tap = block % taps;
  block /= taps;
  const int32_t row = block % down * C::kRows, split = block / down;
  const int32_t r = tap / c.kernel_w, s = tap % c.kernel_w;
  const int32_t positions = c.n * c.height * c.width;
  const int32_t first = split * c.share, end = min(positions, first + c.share);
  const int32_t stages = (end - first + C::kPositions - 1) / C::kPositions;
  const int32_t total = c.mean_above ? 2 * stages : stages;

  const int warp = threadIdx.x / 32;
  constexpr int kWarpsDown = C::kRows / (16 * C::M);
  const int warp_row = warp % kWarpsDown * 16 * C::M, warp_column = warp / kWarpsDown * 8 * C::N;
  float acc[C::M][C::N][4];
#pragma unroll
  for (int m = 0; m < C::M; ++m) {
#pragma unroll
    for (int n = 0; n < C::N; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
  }
  FetchPositions<C> next(c, first, end, row, column, r, s);
  const auto fetch = [&](int32_t i) {
    if (i == stages) next.rewind();
    if (i < total) {
      next(shared + i % kStages * C::kStageBytes,
           i < stages ? Pair{c.difference_above, c.mean_below} : Pair{c.mean_above, c.difference_below});
    }
    ptx::copy_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  for (int32_t i = 0; i < total; ++i) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    fetch(i + kStages - 1);
    const unsigned char* a = shared + i % kStages * C::kStageBytes;
    correlate_tiles<C>(acc, a, a + C::kABytes, warp_row, warp_column);
    if (i + 1 == stages) scale(acc, c.ratio);
  }
  ptx::copy_wait<0>();
  __syncthreads();
  float* tile = reinterpret_cast<float*>(shared);
  stage<C::kColumns>(acc, tile, warp_row, warp_column);
  __syncthreads();
  constexpr int kLanes = C::kColumns / 4;
  const int in = threadIdx.x % kLanes * 4;
  if (column + in >= c.columns) return;
  for (int i = threadIdx.x / kLanes; i < C::kRows && row + i < c.rows; i += C::kThreads / kLanes) {
    const int64_t at = ((static_cast<int64_t>(split) * c.rows + row + i) * taps + tap) * c.columns + column + in;
    const float4 sum = *reinterpret_cast<const float4*>(tile + staged_at<C::kColumns>(i, in));
    store4(c.partial, at, {{sum.x, sum.y, sum.z, sum.w}});
  }
}

}  // namespace ep::cuda
