#pragma once

#include "contrast.cuh"
#include "tile.cuh"

namespace ep::cuda {

// Of one split.
inline int64_t contrast_blocks(const Contrast& c, int32_t rows, int32_t columns) {
  return over(c.rows, rows) * over(c.columns, columns) * c.kernel_h * c.kernel_w;
}

// Positions are split until the device is full: what tells sizes apart is the work of a round, waste at the edges in
// it.
inline const SizeRow& contrast_size(const Contrast& c) {
  const auto work = [&](const SizeRow& row) {
    return contrast_blocks(c, row.rows, row.columns) * row.rows * row.columns / row.efficiency;
  };
  return *std::min_element(std::begin(kSizes), std::end(kSizes),
                           [&](const SizeRow& a, const SizeRow& b) { return work(a) < work(b); });
}

// Into how many parts the positions go: the fewest rounds over the device times stages of a part, then the fewest
// parts.
template <Products P>
void split_contrast(Contrast& c, const Device& device) {
  check_positions(static_cast<int64_t>(c.n) * c.height * c.width);
  const SizeRow& size = contrast_size(c);
  with_tile<P, Correlation>(size.size, [&](auto tile) {
    using C = decltype(tile);
    const int64_t places = static_cast<int64_t>(device.processors) * resident(size, device);
    const int64_t blocks = contrast_blocks(c, C::kRows, C::kColumns);
    const int64_t stages = over(static_cast<int64_t>(c.n) * c.height * c.width, C::kPositions);
    int64_t best = 1, least = -1;
    for (int64_t splits = 1; splits <= stages && (splits == 1 || splits * blocks <= 4 * places); ++splits) {
      const int64_t time = over(blocks * splits, places) * over(stages, splits);
      if (least < 0 || time < least) {
        least = time;
        best = splits;
      }
    }
    const int64_t share = over(stages, best);
    c.share = static_cast<int32_t>(share * C::kPositions);
    c.splits = static_cast<int32_t>(over(stages, share));
  });
}

template <Products P>
void launch_contrast(const Contrast& c, cudaStream_t stream) {
  with_tile<P, Correlation>(contrast_size(c).size, [&](auto tile) {
    using C = decltype(tile);
    const int64_t blocks = contrast_blocks(c, C::kRows, C::kColumns) * c.splits;
    launch_kernel(&contrast_kernel<C>, blocks, C::kThreads, C::kSharedBytes, stream, c);
  });
}

}  // namespace ep::cuda
