// The instructions that C++ has no words for. Compiled for the host (tests/host), the functions of the same names come
// from there. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k8", "ldmatrix".
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "host_ptx.h"
#else

namespace ep::cuda::ptx {

// Dynamic shared memory of the block.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char ep_shared[];
  return ep_shared;
}

__device__ inline uint32_t address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory, both aligned to 16; zeros if not valid (`global` is then not read). The
// calling thread sees them after copy_wait, others after a barrier that follows it.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// The same through the first-level cache, for what a block reads again: the patches of neighbouring taps overlap.
__device__ inline void copy_async_cached(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `pending` of this thread's newest groups are unfinished.
template <int pending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8, and gets of matrix j,
// row lane / 4, the elements 2 (lane % 4) and the next in out[j].
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address(row))
               : "memory");
}

// The same, transposed: of matrix j, rows 2 (lane % 4) and the next, the element lane / 4.
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address(row))
               : "memory");
}

// acc [16, 8] += a [16, 16] b [16, 8].
__device__ inline void multiply_half(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_bfloat(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// acc [16, 8] += a [16, 8] b [8, 8] in tf32; operands rounded by round_tf32.
__device__ inline void multiply_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest tf32, ties away from zero, as float32 bits.
__device__ inline uint32_t round_tf32(uint32_t bits) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(out) : "r"(bits));
  return out;
}

// ---- wgmma: Hopper alone (sm_90a)

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define EP_SM90A(...) __VA_ARGS__
#else
#define EP_SM90A(...) __trap()
#endif

// Describes a K-major tile of 128-byte rows in the 128-byte swizzle: address, 1,024 bytes from eight rows to the next
// eight, and the swizzle's code. `shared` is aligned to 1,024 bytes plus a multiple of 32 along K.
__device__ inline uint64_t describe(const void* shared) {
  return static_cast<uint64_t>((address(shared) & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// What this thread wrote to shared memory, wgmma of all threads may read after the next barrier.
__device__ inline void publish_shared() { EP_SM90A(asm volatile("fence.proxy.async.shared::cta;\n" :: : "memory")); }

// Before the first multiply_warpgroup, and after a change of its accumulators.
__device__ inline void warpgroup_arrive() { EP_SM90A(asm volatile("wgmma.fence.sync.aligned;\n" :: : "memory")); }

__device__ inline void warpgroup_commit() {
  EP_SM90A(asm volatile("wgmma.commit_group.sync.aligned;\n" :: : "memory"));
}

// Waits until at most `pending` of the newest groups are unfinished.
template <int pending>
__device__ inline void warpgroup_wait() {
  EP_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory"));
}

#define EP_WGMMA(type)                                                                                               \
  asm volatile(                                                                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                   \
      " "                                                                                                            \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,\n"                                     \
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,\n"                           \
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,\n"                           \
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, 0;\n" \
      : "+f"(acc[0][0]), "+f"(acc[0][1]), "+f"(acc[0][2]), "+f"(acc[0][3]), "+f"(acc[1][0]), "+f"(acc[1][1]),        \
        "+f"(acc[1][2]), "+f"(acc[1][3]), "+f"(acc[2][0]), "+f"(acc[2][1]), "+f"(acc[2][2]), "+f"(acc[2][3]),        \
        "+f"(acc[3][0]), "+f"(acc[3][1]), "+f"(acc[3][2]), "+f"(acc[3][3]), "+f"(acc[4][0]), "+f"(acc[4][1]),        \
        "+f"(acc[4][2]), "+f"(acc[4][3]), "+f"(acc[5][0]), "+f"(acc[5][1]), "+f"(acc[5][2]), "+f"(acc[5][3]),        \
        "+f"(acc[6][0]), "+f"(acc[6][1]), "+f"(acc[6][2]), "+f"(acc[6][3]), "+f"(acc[7][0]), "+f"(acc[7][1]),        \
        "+f"(acc[7][2]), "+f"(acc[7][3]), "+f"(acc[8][0]), "+f"(acc[8][1]), "+f"(acc[8][2]), "+f"(acc[8][3]),        \
        "+f"(acc[9][0]), "+f"(acc[9][1]), "+f"(acc[9][2]), "+f"(acc[9][3]), "+f"(acc[10][0]), "+f"(acc[10][1]),      \
        "+f"(acc[10][2]), "+f"(acc[10][3]), "+f"(acc[11][0]), "+f"(acc[11][1]), "+f"(acc[11][2]), "+f"(acc[11][3]),  \
        "+f"(acc[12][0]), "+f"(acc[12][1]), "+f"(acc[12][2]), "+f"(acc[12][3]), "+f"(acc[13][0]), "+f"(acc[13][1]),  \
        "+f"(acc[13][2]), "+f"(acc[13][3]), "+f"(acc[14][0]), "+f"(acc[14][1]), "+f"(acc[14][2]), "+f"(acc[14][3]),  \
        "+f"(acc[15][0]), "+f"(acc[15][1]), "+f"(acc[15][2]), "+f"(acc[15][3])                                       \
      : "l"(a), "l"(b))

// acc [64, 128] += a [64, 16] b [128, 16]^T by four warps, unfinished until its group is waited for. Warp w of the four
// holds rows 16 w and on, in tiles of 16 x 8 in the layout of mma.m16n8.
__device__ inline void multiply_warpgroup_half(float (&acc)[16][4], uint64_t a, uint64_t b) {
  EP_SM90A(EP_WGMMA("f16"));
}

__device__ inline void multiply_warpgroup_bfloat(float (&acc)[16][4], uint64_t a, uint64_t b) {
  EP_SM90A(EP_WGMMA("bf16"));
}

#undef EP_WGMMA
#undef EP_SM90A

}  // namespace ep::cuda::ptx

#endif
