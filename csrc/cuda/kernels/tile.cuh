// Which tile a GEMM-shaped launch takes.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "wgmma.cuh"

namespace ep::cuda {

// Positions x channels of a block. Larger ones read less for each product, smaller ones fill the device. The first two
// multiply by wgmma, with eight warps; the others by mma.sync, with four.
enum class Size { kWide, kBroad, kLarge, kMedium, kSmall };

struct SizeRow {
  Size size;
  int32_t rows, columns;
  int32_t resident;   // blocks that a multiprocessor has registers for
  int32_t shared;     // bytes of a block
  double efficiency;  // of its products: an estimate, until it is measured
};
constexpr SizeRow kWarpgroupSizes[] = {{Size::kWide, 256, 128, 1, 196608, 1.6},
                                       {Size::kBroad, 128, 128, 2, 131072, 1.4}};
constexpr SizeRow kSizes[] = {{Size::kLarge, 128, 128, 2, 65536, 1.0},
                              {Size::kMedium, 128, 64, 3, 49152, 0.8},
                              {Size::kSmall, 64, 64, 4, 32768, 0.6}};

// Blocks that a multiprocessor holds at a time; each has 1 KiB of shared memory besides its own.
inline int32_t resident(const SizeRow& row, const Device& device) {
  return std::max(1, std::min(row.resident, device.shared_memory / (row.shared + 1024)));
}

// The size whose rounds over the device take the least time for `blocks(row)` blocks of it.
template <typename F>
Size choose_size(const Device& device, bool warpgroups, const F& blocks) {
  Size best = Size::kSmall;
  double least = -1;
  const auto consider = [&](const SizeRow& row) {
    const int32_t held = resident(row, device);
    const int64_t places = int64_t{device.processors} * held;
    const double rounds = static_cast<double>((blocks(row) + places - 1) / places);
    const double time = rounds * held * row.rows * row.columns / row.efficiency;
    if (least < 0 || time < least) {
      least = time;
      best = row.size;
    }
  };
  for (const SizeRow& row : kSizes) consider(row);
  for (const SizeRow& row : kWarpgroupSizes) {
    if (warpgroups) consider(row);
  }
  return best;
}

// Threads count positions in 31 bits, those of a last tile beyond the map too.
inline void check_positions(int64_t positions) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 4096;
  if (positions > kMost) {
    throw std::runtime_error("ep_kernels: a map of " + std::to_string(positions) + " positions in all samples; " +
                             std::to_string(kMost) + " are the most");
  }
}

inline int64_t over(int64_t count, int64_t size) { return (count + size - 1) / size; }

constexpr int kStages = 4;

// Calls f(G{}) with the tile of a size that mma.sync multiplies.
template <Products P, template <Products, int, int, int, int, int> typename G, typename F>
void with_tile(Size size, const F& f) {
  switch (size) {
    case Size::kMedium:
      return f(G<P, 128, 64, 64, 32, kStages>{});
    case Size::kSmall:
      return f(G<P, 64, 64, 32, 32, kStages>{});
    default:
      return f(G<P, 128, 128, 64, 64, kStages>{});
  }
}

// Calls f(G{}) with the tile for an implicit GEMM of `positions` x `channels`.
template <Products P, typename F>
void with_gemm(int64_t positions, int32_t channels, const Device& device, const F& f) {
  check_positions(positions);
  constexpr bool k16 = P == Products::kHalf || P == Products::kBFloat;
  const auto blocks = [&](const SizeRow& row) { return over(positions, row.rows) * over(channels, row.columns); };
  const Size size = choose_size(device, k16 && device.warpgroups, blocks);
#ifdef EP_HAVE_SM90A
  if constexpr (k16) {
    if (size == Size::kWide) return f(WarpgroupGemm<P, 256, kStages>{});
    if (size == Size::kBroad) return f(WarpgroupGemm<P, 128, kStages>{});
  }
#endif
  with_tile<P, Gemm>(size, f);
}

}  // namespace ep::cuda
