// Patches of a map and rows of a K-major matrix on their way to shared memory, 16 bytes at a time.
//
// Every chunk comes by cp.async from an address of its own, so a tile is any list of positions: in the order of memory,
// or window by window where the result is pooled; strides and the map's edges cost nothing but the test. G, here and in
// the main loops, is the shape of a tile: kRows positions x kColumns matrix rows, stages of kKBytes of K.
#pragma once

#include "products.cuh"

namespace ep::cuda {

// Where the rows of a tile lie in the output map: in memory order, or four after each other of every 2x2 window.
struct Positions {
  int32_t count, height, width;  // positions in all; of the map
  bool windows;  // then height and width are those of the pooled map, and count is of the windows' pixels

  __device__ void find(int32_t p, int32_t& n, int32_t& h, int32_t& w) const {
    const int32_t pixel = windows ? p & 3 : 0;
    const int32_t q = windows ? p >> 2 : p;
    w = q % width;
    h = q / width % height;
    n = q / (width * height);
    if (windows) {
      h = 2 * h + (pixel >> 1);
      w = 2 * w + (pixel & 1);
    }
  }
};

// Fetches the stages of one K loop after another. Taps vary fastest: the patches of nine taps overlap in the caches.
//
// Of a row of the tile, a thread keeps the address of tap (0, 0) and one bit for each tap that lies inside the map; a
// tap's distance is the same for all rows. Where that does not hold, a strided feedback or a large kernel, it computes
// every address anew.
template <typename G>
class Fetch {
 public:
  __device__ Fetch(const Loop* loops, int count, const Positions& positions, int32_t first_position, int32_t first_row,
                   int32_t rows)
      : loops_(loops), count_(count), positions_(positions), first_position_(first_position) {
    matrix_row_ = first_row + static_cast<int32_t>(threadIdx.x) / G::kChunks;
    rows_left_ = rows - matrix_row_;
    if (count > 0) begin();
  }

  // Starts copying the next stage, if any is left.
  __device__ void operator()(unsigned char* stage) {
    if (l_ == count_) return;
    const Loop& loop = loops_[l_];
    const int chunk = threadIdx.x % G::kChunks, row = threadIdx.x / G::kChunks;
    const int tap = r_ * loop.kernel_w + s_;
    const bool inside = channel_ + chunk * kPerChunk < loop.channels;
    unsigned char* to = stage + chunk_at<G::kKBytes>(row, chunk);  // the swizzle repeats every kRowsApart rows
    if (by_bits_) {
      const uint32_t bit = inside ? 1u << tap : 0;
      const int64_t distance = (static_cast<int64_t>(r_ * loop.width + s_) * loop.channels + channel_) * G::kElement;
#pragma unroll
      for (int i = 0; i < G::kARows; ++i) {
        ptx::copy_async_cached(to + i * kApart, reinterpret_cast<const void*>(patch_[i] + distance),
                               (taps_[i] & bit) != 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < G::kARows; ++i) {
        const int64_t at = address(loop, i);
        ptx::copy_async_cached(to + i * kApart, reinterpret_cast<const void*>(at), inside && at != 0);
      }
    }
    const int taps = loop.kernel_h * loop.kernel_w;
    const int64_t row_bytes = static_cast<int64_t>(taps) * loop.channels * G::kElement;
    int64_t from =
        matrix_ + (static_cast<int64_t>(loop.flip ? taps - 1 - tap : tap) * loop.channels + channel_) * G::kElement;
    to += G::kRows * G::kKBytes;
#pragma unroll
    for (int i = 0; i < G::kBRows; ++i) {
      ptx::copy_async(to + i * kApart, reinterpret_cast<const void*>(from), inside && i * G::kRowsApart < rows_left_);
      from += G::kRowsApart * row_bytes;
    }
    advance();
  }

 private:
  static constexpr int kPerChunk = 16 / G::kElement;
  static constexpr int kApart = G::kRowsApart * G::kKBytes;
  static_assert(G::kRowsApart % 8 == 0, "chunk_at repeats");

  __device__ void begin() {
    const Loop& loop = loops_[l_];
    r_ = s_ = channel_ = 0;
    by_bits_ = loop.div_h == 1 && loop.div_w == 1 && loop.kernel_h * loop.kernel_w <= 32;
    const int chunk = threadIdx.x % G::kChunks;
#pragma unroll
    for (int i = 0; i < G::kARows; ++i) {
      const int32_t p = first_position_ + static_cast<int32_t>(threadIdx.x) / G::kChunks + i * G::kRowsApart;
      int32_t n, h, w;
      positions_.find(p, n, h, w);
      const int32_t y = h * loop.mul_h + loop.off_h, x = w * loop.mul_w + loop.off_w;
      patch_[i] = reinterpret_cast<int64_t>(loop.map) +
                  ((static_cast<int64_t>(n) * loop.height + y) * loop.width + x) * loop.channels * G::kElement +
                  chunk * 16;
      taps_[i] = 0;
      if (!by_bits_ || p >= positions_.count) continue;
      uint32_t across = 0;
#pragma unroll 1
      for (int s = 0; s < loop.kernel_w; ++s) across |= static_cast<uint32_t>(x + s >= 0 && x + s < loop.width) << s;
#pragma unroll 1
      for (int r = 0; r < loop.kernel_h; ++r) {
        if (y + r >= 0 && y + r < loop.height) taps_[i] |= across << r * loop.kernel_w;
      }
    }
    const int64_t row_bytes = static_cast<int64_t>(loop.kernel_h) * loop.kernel_w * loop.channels * G::kElement;
    matrix_ = reinterpret_cast<int64_t>(loop.matrix) + matrix_row_ * row_bytes + chunk * 16;
  }

  // Of row i at the current tap, or 0 outside the map.
  __device__ int64_t address(const Loop& loop, int i) const {
    const int32_t p = first_position_ + static_cast<int32_t>(threadIdx.x) / G::kChunks + i * G::kRowsApart;
    int32_t n, h, w;
    positions_.find(p, n, h, w);
    int32_t y = h * loop.mul_h + loop.off_h + r_, x = w * loop.mul_w + loop.off_w + s_;
    if (p >= positions_.count || y < 0 || x < 0 || y % loop.div_h != 0 || x % loop.div_w != 0) return 0;
    y /= loop.div_h;
    x /= loop.div_w;
    if (y >= loop.height || x >= loop.width) return 0;
    const int64_t pixel = (static_cast<int64_t>(n) * loop.height + y) * loop.width + x;
    const int64_t channel = channel_ + static_cast<int32_t>(threadIdx.x) % G::kChunks * kPerChunk;
    return reinterpret_cast<int64_t>(loop.map) + (pixel * loop.channels + channel) * G::kElement;
  }

  __device__ void advance() {
    const Loop& loop = loops_[l_];
    if (++s_ < loop.kernel_w) return;
    s_ = 0;
    if (++r_ < loop.kernel_h) return;
    r_ = 0;
    channel_ += G::kDepth;
    if (channel_ < loop.channels) return;
    if (++l_ != count_) begin();
  }

  const Loop* const loops_;  // an index and not a moving pointer: kernel parameters are then read as constants
  const int count_;
  int l_ = 0;
  const Positions& positions_;
  int32_t first_position_, matrix_row_, rows_left_;
  int32_t r_, s_, channel_;
  bool by_bits_;
  int64_t patch_[G::kARows];  // addresses as integers: of rows at the edge, tap (0, 0) lies outside the map
  uint32_t taps_[G::kARows];
  int64_t matrix_;
};

template <typename G>
__device__ inline int stages_of(const Loop& loop) {
  return loop.kernel_h * loop.kernel_w * ((loop.channels + G::kDepth - 1) / G::kDepth);
}

}  // namespace ep::cuda
