// The host run's settings and counters, for the module (module.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "include/cuda_host.h"

namespace ep::cuda::host {

// In which order a block's threads get their turn. Kernels must not depend on it.
enum class Order { kForward, kReverse, kRandom };

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 0;
  int processors = 3;  // few, so that work is split unevenly
  int major = 8, minor = 0;
  int shared_memory = 166912;  // of a block, opted in
};
Settings& settings();

struct Counters {
  std::map<std::string, int64_t> kernels;  // launches by name; in a graph, at its replay
  int64_t graph_launches = 0;
  int64_t copies = 0, memsets = 0;
};
Counters& counters();
// Streams, events, graphs and executables not yet destroyed.
std::map<std::string, int64_t> live();

// The name of the kernel at an address of this library: selftest::add.
std::string name_of(const void* address);
// Whether no unpublished copy of this block wrote to the 16 bytes of shared memory at an address.
bool published(const unsigned char* shared);
// Before a block of so many warps: no product is on its way.
void reset_wgmma(int warps);
// Runs a launch's blocks, one after another.
void run(const Launch& launch);

}  // namespace ep::cuda::host
