// wgmma: products are formed when they are issued and delivered when they are waited for, if what they read is still
// there.
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "host.h"
#include "include/host_ptx.h"

namespace ep::cuda::host {
namespace {

constexpr int kRows = 16, kColumns = 128, kDepth = 16, kNumbers = 64;  // of a warp; accumulators of a lane

struct Operands {
  uint16_t a[kRows][kDepth], b[kColumns][kDepth];
};

// 64 numbers of each lane, on their way.
struct Accumulator {
  float* real[32];
  float value[32][kNumbers];
  int in_flight;  // products
};

struct Product {
  uint64_t a, b;
  Operands seen;
  Accumulator* acc;
};

struct Warp {
  std::vector<std::unique_ptr<Accumulator>> accumulators;
  std::vector<std::unique_ptr<Product>> open;
  std::deque<std::vector<std::unique_ptr<Product>>> groups;  // committed, oldest first
  bool fenced = false;                                       // no register was written since warpgroup_arrive
};

std::deque<Warp> warps;  // of the block; never moved

Warp& mine() { return warps[threadIdx.x / 32]; }

// 16 elements of a row of a K-major tile in the 128-byte swizzle: in each 1,024 bytes, bits 4..6 of the address are
// xored with bits 7..9.
void read_row(uint64_t descriptor, int row, uint16_t* to) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("wgmma: a descriptor without the 128-byte swizzle");
  const uint64_t start = (descriptor & 0x3fff) << 4, apart = (descriptor >> 32 & 0x3fff) << 4;
  for (int chunk = 0; chunk < 2; ++chunk) {
    const uint64_t address = start + row / 8 * apart + row % 8 * 128 + chunk * 16;
    const unsigned char* at = shared_memory() + (address ^ (address >> 7 & 7) << 4);
    check_shared("wgmma", at, 16);
    if (!published(at)) fail("wgmma reads a copy that was not published (fence.proxy.async)");
    std::memcpy(to + chunk * 8, at, 16);
  }
}

void read(uint64_t a, uint64_t b, Operands& operands) {
  const int first = static_cast<int>(threadIdx.x / 32 % 4) * kRows;
  for (int i = 0; i < kRows; ++i) read_row(a, first + i, operands.a[i]);
  for (int i = 0; i < kColumns; ++i) read_row(b, i, operands.b[i]);
}

struct Issue {
  float* acc;
  uint64_t a, b;
  float (*value)(uint32_t bits);
};

Accumulator* take(void* const* arguments) {
  Warp& warp = mine();
  float* first = static_cast<Issue*>(arguments[0])->acc;
  for (const auto& each : warp.accumulators) {
    if (each->real[0] == first) return each.get();
  }
  if (!warp.fenced) fail("wgmma: its registers were written after the last warpgroup_arrive (wgmma.fence)");
  Accumulator& taken = *warp.accumulators.emplace_back(new Accumulator);
  taken.in_flight = 0;
  for (int lane = 0; lane < 32; ++lane) {
    taken.real[lane] = static_cast<Issue*>(arguments[lane])->acc;
    std::memcpy(taken.value[lane], taken.real[lane], sizeof taken.value[lane]);
    std::memset(taken.real[lane], 0xff, sizeof taken.value[lane]);
  }
  return &taken;
}

void issue(void* const* arguments, uint32_t) {
  const Issue& first = *static_cast<Issue*>(arguments[0]);
  for (int lane = 1; lane < 32; ++lane) {
    const Issue& other = *static_cast<Issue*>(arguments[lane]);
    if (other.a != first.a || other.b != first.b) fail("wgmma: the lanes' descriptors differ");
  }
  auto product = std::make_unique<Product>();
  product->a = first.a;
  product->b = first.b;
  product->acc = take(arguments);
  ++product->acc->in_flight;
  read(first.a, first.b, product->seen);
  static float a[kRows][kDepth], b[kDepth][kColumns];
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < kRows; ++row) a[row][k] = first.value(product->seen.a[row][k]);
    for (int column = 0; column < kColumns; ++column) b[k][column] = first.value(product->seen.b[column][k]);
  }
  for (int row = 0; row < kRows; ++row) {
    float sum[kColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < kColumns; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < kColumns; ++column) {
      const int lane = row % 8 * 4 + column % 8 / 2;
      product->acc->value[lane][column / 8 * 4 + row / 8 * 2 + column % 2] += sum[column];
    }
  }
  mine().open.push_back(std::move(product));
}

void finish(const Product& product) {
  Operands now;
  read(product.a, product.b, now);
  if (std::memcmp(&now, &product.seen, sizeof now) != 0) fail("wgmma: what it reads was written before its wait");
  Accumulator* acc = product.acc;
  if (--acc->in_flight > 0) return;
  for (int lane = 0; lane < 32; ++lane) std::memcpy(acc->real[lane], acc->value[lane], sizeof acc->value[lane]);
  Warp& warp = mine();
  warp.fenced = false;
  for (auto each = warp.accumulators.begin(); each != warp.accumulators.end(); ++each) {
    if (each->get() != acc) continue;
    warp.accumulators.erase(each);
    return;
  }
}

}  // namespace

void reset_wgmma(int count) {
  warps.clear();
  warps.resize(count);
}

void multiply_warpgroup(const char* what, float (&acc)[16][4], uint64_t a, uint64_t b, float (*value)(uint32_t bits)) {
  if (settings().major != 9) fail("wgmma on a device that is not sm_90a");
  Issue mine{&acc[0][0], a, b, value};
  collective(what, ~0u, true, &mine, issue);
}

void warpgroup_arrive() {
  collective("wgmma.fence", ~0u, true, nullptr, [](void* const*, uint32_t) { mine().fenced = true; });
}

void warpgroup_commit() {
  collective("wgmma.commit_group", ~0u, true, nullptr, [](void* const*, uint32_t) {
    mine().groups.push_back(std::move(mine().open));
    mine().open.clear();
  });
}

void warpgroup_wait(int pending) {
  collective("wgmma.wait_group", ~0u, true, &pending, [](void* const* arguments, uint32_t) {
    while (static_cast<int>(mine().groups.size()) > *static_cast<int*>(arguments[0])) {
      for (const auto& product : mine().groups.front()) finish(*product);
      mine().groups.pop_front();
    }
  });
}

}  // namespace ep::cuda::host
