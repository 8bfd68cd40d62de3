// The scheduler: runs the blocks of a launch one after another, a block's threads as fibers.
#include "host.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"
#include "include/host_ptx.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace ep::cuda::host {
namespace {

constexpr int kLanes = 32;
constexpr size_t kGuard = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN as float16, bfloat16 and float32
constexpr unsigned char kGuardByte = 0xfd;

enum class State : uint8_t { kReady, kBarrier, kCollective, kExited };

struct Thread {
  State state;
  const char* what;  // it waits for
  uint32_t mask;
  void* argument;
};

struct Copy {
  void* shared;
  const void* global;  // null: zeros
};

struct Copies {
  std::vector<Copy> pending;        // oldest first
  std::vector<size_t> groups;       // committed ones: how many copies each has
  size_t open = 0;                  // copies since the last commit
  std::vector<size_t> unpublished;  // chunks of shared memory
};

struct Warp {
  uint32_t lanes, ready, collective;  // that exist, can run, wait for lanes
};

struct Block {
  const Launch* launch = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Copies> copies;
  std::vector<bool> unpublished;  // by 16 bytes of shared memory; kept for devices with wgmma
  int at_barrier, predicates, predicate_result, exited;
  std::unique_ptr<unsigned char[]> memory;
  size_t capacity = 0;
  unsigned char* shared = nullptr;
  std::exception_ptr error;
  uint64_t random;
};

Block block;

uint32_t draw() {  // splitmix64
  uint64_t z = block.random += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>(z >> 32);
}

// 0 .. count - 1 in the order of their turns; a block has as many warps at most as a warp has lanes.
std::array<int, kLanes> turns(int count) {
  std::array<int, kLanes> order;
  for (int i = 0; i < count; ++i) order[i] = settings().order == Order::kReverse ? count - 1 - i : i;
  if (settings().order == Order::kRandom) {
    for (int i = count - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
  }
  return order;
}

bool same(const char* what, const char* other) { return what == other || std::strcmp(what, other) == 0; }

std::string where() {
  std::ostringstream out;
  out << "ep host run: kernel " << name_of(block.launch->key) << ", block " << blockIdx.x;
  return out.str();
}

// Ends the turn of the running thread: the next lane's comes, or after the last one run_warp's.
void yield() {
  const uint32_t ready = block.warps[threadIdx.x / kLanes].ready, bit = 1u << (threadIdx.x % kLanes);
  const Order order = settings().order;
  const uint32_t later = order == Order::kForward ? ready & ~(bit | (bit - 1)) : ready & (bit - 1);
  if (order == Order::kRandom || later == 0 || block.error) return leave();
  const int lane = order == Order::kForward ? __builtin_ctz(later) : kLanes - 1 - __builtin_clz(later);
  threadIdx.x = threadIdx.x / kLanes * kLanes + lane;
  pass(static_cast<int>(threadIdx.x));
}

void wait(State state, const char* what, uint32_t mask, void* argument) {
  block.threads[threadIdx.x] = {state, what, mask, argument};
  block.warps[threadIdx.x / kLanes].ready &= ~(1u << (threadIdx.x % kLanes));
  yield();
}

void thread_main() {
  try {
    block.launch->thread();
  } catch (...) {
    block.error = std::current_exception();
  }
  ++block.exited;
  wait(State::kExited, "exit", 0, nullptr);
  std::abort();  // an exited fiber is never entered
}

void check_guard(const unsigned char* zone, const char* side) {
  if (zone[0] == kGuardByte && std::memcmp(zone, zone + 1, kGuard - 1) == 0) return;
  const auto* at = std::find_if(zone, zone + kGuard, [](unsigned char byte) { return byte != kGuardByte; });
  std::ostringstream out;
  out << where() << ": wrote " << side << " its " << block.launch->shared << " bytes of shared memory, at byte "
      << at - block.shared;
  throw std::runtime_error(out.str());
}

void prepare_memory(size_t shared) {
  constexpr size_t align = 1024;
  const size_t bytes = shared + 2 * kGuard + align;
  if (bytes > block.capacity) {
    block.memory.reset(new unsigned char[bytes]);
    block.capacity = bytes;
  }
  const auto start = reinterpret_cast<uintptr_t>(block.memory.get()) + kGuard;
  block.shared = block.memory.get() + kGuard + (align - start % align) % align;
  std::memset(block.shared, kPoison, shared);
  std::memset(block.shared - kGuard, kGuardByte, kGuard);
  std::memset(block.shared + shared, kGuardByte, kGuard);
}

void prepare_threads(int count) {
  block.threads.assign(count, {State::kReady, "", 0, nullptr});
  block.warps.clear();
  for (int first = 0; first < count; first += kLanes) {
    const uint32_t lanes = count - first < kLanes ? (1u << (count - first)) - 1 : ~0u;
    block.warps.push_back({lanes, lanes, 0});
  }
  block.copies.resize(count);
  for (Copies& copies : block.copies) {
    copies.pending.clear();
    copies.groups.clear();
    copies.unpublished.clear();
    copies.open = 0;
  }
  if (settings().major >= 9) {
    block.unpublished.assign(block.launch->shared / 16 + 1, false);
    reset_wgmma(static_cast<int>(block.warps.size()));
  }
  block.at_barrier = block.predicates = block.exited = 0;
  block.error = nullptr;
  for (int i = 0; i < count; ++i) start(i, thread_main);
}

// Whether any lane ran. In a random order a warp is also left while some can run.
bool run_warp(int index) {
  Warp& warp = block.warps[index];
  bool any = false;
  while (warp.ready != 0) {
    any = true;
    const auto order = turns(kLanes);
    for (const int lane : order) {
      if ((warp.ready >> lane & 1) == 0) continue;
      threadIdx.x = index * kLanes + lane;
      enter(threadIdx.x);
      if (block.error) std::rethrow_exception(block.error);
    }
    if (settings().order == Order::kRandom && draw() % 2 == 0) break;
  }
  return any;
}

[[noreturn]] void deadlock() {
  std::map<std::string, std::pair<int, int>> waiting;  // how many, the first
  for (size_t i = 0; i < block.threads.size(); ++i) {
    const Thread& thread = block.threads[i];
    const std::string what = thread.state == State::kExited ? "exited" : std::string("at ") + thread.what;
    ++waiting.try_emplace(what, 0, static_cast<int>(i)).first->second.first;
  }
  std::ostringstream out;
  out << where() << ": deadlock:";
  const char* separator = " ";
  for (const auto& [what, threads] : waiting) {
    out << separator << threads.first << " threads " << what << " (first: thread " << threads.second << ')';
    separator = ", ";
  }
  throw std::runtime_error(out.str());
}

void release_barrier() {
  const char* what = block.threads[0].what;
  for (const Thread& thread : block.threads) {
    if (!same(thread.what, what)) deadlock();
  }
  block.predicate_result = block.predicates;
  block.at_barrier = block.predicates = 0;
  for (Thread& thread : block.threads) thread.state = State::kReady;
  for (Warp& warp : block.warps) warp.ready = warp.lanes;
}

void run_block() {
  const int count = static_cast<int>(block.launch->block);
  prepare_memory(block.launch->shared);
  prepare_threads(count);
  while (block.exited < count) {
    bool progress = false;
    const int warps = static_cast<int>(block.warps.size());
    const auto order = turns(warps);
    for (int i = 0; i < warps; ++i) progress |= run_warp(order[i]);
    if (block.at_barrier == count) {
      release_barrier();
    } else if (!progress) {
      deadlock();
    }
  }
  check_guard(block.shared - kGuard, "before");
  check_guard(block.shared + block.launch->shared, "after");
}

}  // namespace

Settings& settings() {
  static Settings instance;
  return instance;
}

Counters& counters() {
  static Counters instance;
  return instance;
}

void run(const Launch& launch) {
  static std::mutex one;  // threadIdx and its like are plain variables
  const std::lock_guard<std::mutex> lock(one);
  ++counters().kernels[name_of(launch.key)];
  block.launch = &launch;
  block.random = settings().seed;
  blockDim = dim3(launch.block);
  gridDim = dim3(launch.grid);
  threadIdx = blockIdx = {0, 0, 0};
  for (blockIdx.x = 0; blockIdx.x < launch.grid; ++blockIdx.x) run_block();
}

void fail(const char* message) {
  throw std::runtime_error(where() + ", thread " + std::to_string(threadIdx.x) + ": " + message);
}

int barrier(const char* what, bool predicate) {
  block.predicates += predicate;
  ++block.at_barrier;
  wait(State::kBarrier, what, 0, nullptr);
  return block.predicate_result;
}

void collective(const char* what, uint32_t mask, bool aligned, void* argument, Finish finish) {
  const int index = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  Warp& warp = block.warps[index];
  if ((mask >> lane & 1) == 0) fail((std::string(what) + ": the calling lane is not in the mask").c_str());
  const uint32_t lanes = aligned ? mask : mask & warp.lanes;
  warp.collective |= 1u << lane;
  if ((warp.collective & lanes) == lanes) {
    void* arguments[kLanes] = {};
    for (int other = 0; other < kLanes; ++other) {
      if ((lanes >> other & 1) == 0) continue;
      const Thread& thread = block.threads[index * kLanes + other];
      if (other != lane && (thread.mask != mask || !same(thread.what, what))) {
        std::ostringstream out;
        out << what << " with mask " << std::hex << mask << " while lane " << std::dec << other << " is at "
            << thread.what << " with mask " << std::hex << thread.mask;
        fail(out.str().c_str());
      }
      arguments[other] = other == lane ? argument : thread.argument;
    }
    finish(arguments, lanes);
    warp.collective &= ~lanes;
    warp.ready |= lanes;
    return yield();  // this lane has no turn before the others: after a collective, they run in the order that is set
  }
  wait(State::kCollective, what, mask, argument);
}

unsigned char* shared_memory() { return block.shared; }

void check_shared(const char* what, const void* data, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  if (at >= block.shared && at + bytes <= block.shared + block.launch->shared &&
      reinterpret_cast<uintptr_t>(at) % bytes == 0) {
    return;
  }
  std::ostringstream out;
  out << what << ": shared memory address: expected a multiple of " << bytes << " in [0, " << block.launch->shared
      << "), got " << at - block.shared;
  fail(out.str().c_str());
}

void copy_async(void* shared, const void* global, bool valid) {
  check_shared("cp.async", shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("cp.async: the global address is not a multiple of 16");
  std::memset(shared, kPoison, 16);
  Copies& copies = block.copies[threadIdx.x];
  copies.pending.push_back({shared, valid ? global : nullptr});
  ++copies.open;
}

void copy_commit() {
  Copies& copies = block.copies[threadIdx.x];
  copies.groups.push_back(copies.open);
  copies.open = 0;
}

void copy_wait(int pending) {
  Copies& copies = block.copies[threadIdx.x];
  size_t done = 0;
  while (static_cast<int>(copies.groups.size()) > pending) {
    for (size_t i = 0; i < copies.groups.front(); ++i, ++done) {
      const Copy& copy = copies.pending[done];
      if (copy.global == nullptr) {
        std::memset(copy.shared, 0, 16);
      } else {
        std::memcpy(copy.shared, copy.global, 16);
      }
      if (settings().major >= 9) {
        copies.unpublished.push_back(static_cast<size_t>(static_cast<unsigned char*>(copy.shared) - block.shared) / 16);
        block.unpublished[copies.unpublished.back()] = true;
      }
    }
    copies.groups.erase(copies.groups.begin());
  }
  copies.pending.erase(copies.pending.begin(), copies.pending.begin() + static_cast<std::ptrdiff_t>(done));
}

bool published(const unsigned char* shared) {
  return !block.unpublished[static_cast<size_t>(shared - block.shared) / 16];
}

void publish_shared() {
  Copies& copies = block.copies[threadIdx.x];
  for (const size_t chunk : copies.unpublished) block.unpublished[chunk] = false;
  copies.unpublished.clear();
}

}  // namespace ep::cuda::host
