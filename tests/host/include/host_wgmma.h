// Stand-ins for the wgmma functions of csrc/cuda/kernels/ptx.cuh, after the PTX ISA: "Asynchronous Warpgroup Level
// Matrix Instructions". A warp computes its own 16 of a product's 64 rows (tests/host/wgmma.cpp).
#pragma once

#include "cuda_host.h"

namespace ep::cuda::host {

// Issues the product of a warp: its accumulators are NaN until the product's group is waited for.
void multiply_warpgroup(const char* what, float (&acc)[16][4], uint64_t a, uint64_t b, float (*value)(uint32_t bits));
void warpgroup_arrive();
void warpgroup_commit();
void warpgroup_wait(int pending);
// Copies that this thread waited for are visible to wgmma after this.
void publish_shared();

}  // namespace ep::cuda::host

namespace ep::cuda::ptx {

inline uint64_t describe(const void* shared) {
  const auto address = static_cast<uint64_t>(static_cast<const unsigned char*>(shared) - host::shared_memory());
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

inline void publish_shared() { host::publish_shared(); }
inline void warpgroup_arrive() { host::warpgroup_arrive(); }
inline void warpgroup_commit() { host::warpgroup_commit(); }
template <int pending>
void warpgroup_wait() {
  host::warpgroup_wait(pending);
}

inline void multiply_warpgroup_half(float (&acc)[16][4], uint64_t a, uint64_t b) {
  host::multiply_warpgroup("wgmma.f16", acc, a, b, HalfBits::value);
}

inline void multiply_warpgroup_bfloat(float (&acc)[16][4], uint64_t a, uint64_t b) {
  host::multiply_warpgroup("wgmma.bf16", acc, a, b, BFloatBits::value);
}

}  // namespace ep::cuda::ptx
