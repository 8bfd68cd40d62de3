#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <stdexcept>

#include "host_ptx.h"
#include "selftest.h"

namespace ep::cuda::selftest {
namespace {

struct Arguments {
  const void* in;
  void* out;
  int option;
};

template <typename T>
const T* in(const Arguments& arguments) {
  return static_cast<const T*>(arguments.in);
}
template <typename T>
T* out(const Arguments& arguments) {
  return static_cast<T*>(arguments.out);
}

// ---- the block
// ------------------------------------------------------------------------------------------------------- Each of
// `option` rounds adds the next thread's number.
__global__ void neighbours(Arguments arguments) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < arguments.option; ++round) {
    shared[threadIdx.x] = in<float>(arguments)[at] + static_cast<float>(round);
    __syncthreads();
    sum += shared[(threadIdx.x + 1) % blockDim.x];
    __syncthreads();
  }
  out<float>(arguments)[at] = sum;
}

__global__ void votes(Arguments arguments) {
  const int x = in<int>(arguments)[threadIdx.x];
  int* to = out<int>(arguments) + 6 * threadIdx.x;
  to[0] = __syncthreads_or(x);
  to[1] = __syncthreads_and(x);
  to[2] = __syncthreads_count(x);
  to[3] = __any_sync(~0u, x);
  to[4] = __all_sync(~0u, x);
  to[5] = static_cast<int>(__ballot_sync(~0u, x));
}

// The order in which threads come, and what dynamic shared memory holds at the start.
__global__ void turns(Arguments arguments) {
  int* to = out<int>(arguments);
  to[1 + atomicAdd(to, 1)] = static_cast<int>(threadIdx.x);
}

__global__ void fresh(Arguments arguments) {
  out<uint32_t>(arguments)[threadIdx.x] = reinterpret_cast<uint32_t*>(ptx::shared_memory())[threadIdx.x];
  reinterpret_cast<uint32_t*>(ptx::shared_memory())[threadIdx.x] = 0;
}

// Writes one byte at `option`.
__global__ void overrun(Arguments arguments) {
  if (threadIdx.x == 0) ptx::shared_memory()[arguments.option] = 0;
}

__global__ void stuck(Arguments arguments) {
  switch (arguments.option) {
    case 0:  // a thread that leaves before a barrier
      if (threadIdx.x == 7) return;
      __syncthreads();
      break;
    case 1:  // a lane that leaves before a shuffle
      if (threadIdx.x == 7) return;
      __shfl_sync(~0u, 1, 0);
      break;
    case 2:  // lanes at different collectives
      if (threadIdx.x == 7) {
        __any_sync(~0u, 1);
      } else {
        __syncwarp();
      }
      break;
    case 3:  // a warp at a barrier of another kind
      if (threadIdx.x < 32) {
        __syncthreads_or(1);
      } else {
        __syncthreads();
      }
      break;
    case 4:  // a warp collective of some lanes, the others at the barrier
      if (threadIdx.x == 7) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      break;
    case 5:
      __syncwarp(1u);
      break;
    case 6:
      if (threadIdx.x == 5) throw std::out_of_range("thrown by a thread");
      __syncthreads();
      break;
    default:  // lanes that take turns in two halves
      __syncwarp(threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u);
  }
}

// ---- the warp
__global__ void shuffles(Arguments arguments) {
  const float x = in<float>(arguments)[threadIdx.x];
  float* to = out<float>(arguments) + 6 * threadIdx.x;
  to[0] = __shfl_sync(~0u, x, 5);
  to[1] = __shfl_sync(~0u, x, 3, 8);
  to[2] = __shfl_xor_sync(~0u, x, arguments.option);
  to[3] = __shfl_down_sync(~0u, x, 3u);
  to[4] = __shfl_up_sync(~0u, x, 3u, 16);
  to[5] = threadIdx.x < 16 ? __shfl_xor_sync(0xffffu, x, 1) : 0.0f;
}

// Four 8x8 matrices of 16 bits, one after the other.
__global__ void matrices(Arguments arguments) {
  auto* shared = reinterpret_cast<uint16_t*>(ptx::shared_memory());
  for (int i = 0; i < 8; ++i) shared[8 * threadIdx.x + i] = in<uint16_t>(arguments)[8 * threadIdx.x + i];
  __syncwarp();
  uint32_t loaded[4];
  if (arguments.option == 0) {
    ptx::load_matrices(loaded, shared + 8 * threadIdx.x);
  } else {
    ptx::load_matrices_transposed(loaded, shared + 8 * threadIdx.x);
  }
  for (int i = 0; i < 4; ++i) out<uint32_t>(arguments)[4 * threadIdx.x + i] = loaded[i];
}

// Of each lane four registers of a, two of b, four of the accumulator.
__global__ void product(Arguments arguments) {
  const uint32_t* from = in<uint32_t>(arguments) + 10 * threadIdx.x;
  const uint32_t a[4] = {from[0], from[1], from[2], from[3]};
  float acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = __uint_as_float(from[6 + i]);
  if (arguments.option == 0) ptx::multiply_half(acc, a, from[4], from[5]);
  if (arguments.option == 1) ptx::multiply_bfloat(acc, a, from[4], from[5]);
  if (arguments.option == 2) ptx::multiply_tf32(acc, a, from[4], from[5]);
  for (int i = 0; i < 4; ++i) out<float>(arguments)[4 * threadIdx.x + i] = acc[i];
}

// ---- cp.async
// -------------------------------------------------------------------------------------------------------- Of five
// chunks two are committed, then one that is not valid, then one; the fifth is left open. out: all five after each of
// three waits.
__global__ void copies(Arguments arguments) {
  unsigned char* shared = ptx::shared_memory();
  const auto* from = in<unsigned char>(arguments);
  ptx::copy_async(shared, from, true);
  ptx::copy_async(shared + 16, from + 16, true);
  ptx::copy_commit();
  ptx::copy_async(shared + 32, nullptr, false);
  ptx::copy_commit();
  ptx::copy_async(shared + 48, from + 48 + arguments.option, true);
  ptx::copy_commit();
  ptx::copy_async(shared + 64, from + 64, true);
  unsigned char* to = out<unsigned char>(arguments);
  std::memcpy(to, shared, 80);
  ptx::copy_wait<2>();
  std::memcpy(to + 80, shared, 80);
  ptx::copy_wait<1>();
  std::memcpy(to + 160, shared, 80);
  ptx::copy_wait<0>();
  std::memcpy(to + 240, shared, 80);
}

// One warp after the other half: out [16, 8] = a [16, K] b [8, K]^T of float16, K = 16 option, in two stages of shared
// memory. 32 threads copy; the 32 others multiply.
__global__ void tile(Arguments arguments) {
  constexpr int kStage = 24 * 32;  // rows of a and b, 16 halves each
  unsigned char* shared = ptx::shared_memory();
  const int lane = threadIdx.x % 32, steps = arguments.option;
  const auto fill = [&](int step) {
    for (int chunk = lane; chunk < 48 && step < steps; chunk += 32) {
      const auto* row = in<unsigned char>(arguments) + chunk / 2 * 32 * steps;
      ptx::copy_async(shared + step % 2 * kStage + chunk * 16, row + step * 32 + chunk % 2 * 16, true);
    }
    ptx::copy_commit();
  };
  float acc[4] = {};
  if (threadIdx.x < 32) fill(0);
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x < 32) {
      fill(step + 1);
      ptx::copy_wait<1>();
    }
    __syncthreads();
    if (threadIdx.x >= 32) {
      const unsigned char* stage = shared + step % 2 * kStage;
      uint32_t a[4], b[4];
      ptx::load_matrices(a, stage + lane % 16 * 32 + lane / 16 * 16);
      ptx::load_matrices(b, stage + (16 + lane % 8) * 32 + lane / 8 % 2 * 16);
      ptx::multiply_half(acc, a, b[0], b[1]);
    }
    __syncthreads();
  }
  if (threadIdx.x < 32) return;
  for (int i = 0; i < 4; ++i) out<float>(arguments)[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

// ---- wgmma
// ----------------------------------------------------------------------------------------------------------- out [64,
// 128] = a [64, K] b [128, K]^T of float16 or (option < 0) bfloat16, K = 64 |option|, in three stages, one of which is
// being copied and two multiplied.
__global__ void warpgroup(Arguments arguments) {
  constexpr int kStage = (64 + 128) * 128;
  unsigned char* shared = ptx::shared_memory();
  const int steps = std::abs(arguments.option);
  const auto fill = [&](int step) {
    for (int chunk = threadIdx.x; chunk < kStage / 16 && step < steps; chunk += 128) {
      const int row = chunk / 8, at = chunk % 8;
      const auto* from = in<unsigned char>(arguments) + (row * steps + step) * 128 + at * 16;
      ptx::copy_async(shared + step % 3 * kStage + row * 128 + (at ^ row % 8) * 16, from, true);
    }
    ptx::copy_commit();
  };
  float acc[16][4] = {};
  fill(0);
  for (int step = 0; step < steps; ++step) {
    ptx::copy_wait<0>();
    ptx::publish_shared();
    __syncthreads();
    const unsigned char* stage = shared + step % 3 * kStage;
    ptx::warpgroup_arrive();
    for (int k = 0; k < 128; k += 32) {
      const uint64_t a = ptx::describe(stage + k), b = ptx::describe(stage + 64 * 128 + k);
      arguments.option < 0 ? ptx::multiply_warpgroup_bfloat(acc, a, b) : ptx::multiply_warpgroup_half(acc, a, b);
    }
    ptx::warpgroup_commit();
    fill(step + 1);
    ptx::warpgroup_wait<1>();
  }
  ptx::warpgroup_wait<0>();
  const int lane = threadIdx.x % 32;
  for (int n = 0; n < 16; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4 + i / 2 * 8;
      out<float>(arguments)[row * 128 + n * 8 + lane % 4 * 2 + i % 2] = acc[n][i];
    }
  }
}

// ---- launches
__global__ void add(Arguments arguments) { out<float>(arguments)[threadIdx.x] += 1.0f; }
__global__ void twice(Arguments arguments) { out<float>(arguments)[threadIdx.x] *= 2.0f; }

using Kernel = void (*)(Arguments);

void start(Kernel kernel, unsigned blocks, unsigned threads, size_t shared, cudaStream_t stream,
           const Arguments& arguments) {
  host::launch(reinterpret_cast<const void*>(kernel), kernel, blocks, threads, shared, stream, arguments);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
}

}  // namespace

void run(const std::string& name, unsigned blocks, unsigned threads, size_t shared, uintptr_t in, uintptr_t out,
         int option) {
  static const std::map<std::string, Kernel> kernels = {
      {"neighbours", neighbours}, {"votes", votes},   {"turns", turns},       {"fresh", fresh},
      {"overrun", overrun},       {"stuck", stuck},   {"shuffles", shuffles}, {"matrices", matrices},
      {"product", product},       {"copies", copies}, {"tile", tile},         {"warpgroup", warpgroup}};
  if (shared > 48 << 10) {
    check(
        cudaFuncSetAttribute(kernels.at(name), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  start(kernels.at(name), blocks, threads, shared, nullptr,
        {reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), option});
  check(cudaGetLastError());
}

std::string launch_error(unsigned blocks, unsigned threads, size_t shared, int allow) {
  cudaError_t error =
      allow == 0 ? cudaSuccess : cudaFuncSetAttribute(fresh, cudaFuncAttributeMaxDynamicSharedMemorySize, allow);
  std::string result = cudaGetErrorName(error);
  cudaGetLastError();
  uint32_t words[1024];
  start(fresh, blocks, threads, shared, nullptr, {nullptr, words, 0});
  error = cudaPeekAtLastError();
  if (cudaGetLastError() != error || cudaGetLastError() != cudaSuccess) throw std::runtime_error("a lost error");
  return result + " " + cudaGetErrorName(error);
}

void graph(uintptr_t out, int size, int replays, bool fork) {
  cudaStream_t stream, other;
  cudaEvent_t forked, joined;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  check(cudaEventCreateWithFlags(&forked, cudaEventDisableTiming));
  check(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming));
  const Arguments arguments{nullptr, reinterpret_cast<void*>(out), 0};
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  check(cudaMemsetAsync(arguments.out, 0, size * sizeof(float), stream));
  cudaStream_t middle = stream;
  if (fork) {
    check(cudaEventRecord(forked, stream));
    check(cudaStreamWaitEvent(other, forked, 0));
    middle = other;
  }
  start(add, 1, size, 0, middle, arguments);
  if (fork) {
    check(cudaEventRecord(joined, other));
    check(cudaStreamWaitEvent(stream, joined, 0));
  }
  start(twice, 1, size, 0, stream, arguments);
  check(cudaGetLastError());
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(middle, &status));
  if (status != cudaStreamCaptureStatusActive) throw std::runtime_error("no capture");
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphDestroy(graph));
  for (int i = 0; i < replays; ++i) check(cudaGraphLaunch(exec, stream));
  check(cudaStreamSynchronize(stream));
  check(cudaGraphExecDestroy(exec));
  check(cudaEventDestroy(joined));
  check(cudaEventDestroy(forked));
  check(cudaStreamDestroy(other));
  check(cudaStreamDestroy(stream));
}

std::string capture_error(const std::string& use) {
  cudaStream_t stream, other;
  cudaEvent_t event;
  cudaGraph_t graph = nullptr;
  float value = 0.0f;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  cudaError_t error = cudaSuccess;
  if (use == "default stream") {
    error = cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal);
  } else {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    check(cudaMemsetAsync(&value, 0xff, sizeof value, stream));
    if (use == "synchronize") {
      error = cudaStreamSynchronize(stream);
    } else if (use == "invalidated") {
      cudaStreamSynchronize(stream);
      error = cudaMemsetAsync(&value, 0, sizeof value, stream);
    } else if (use == "unjoined") {
      check(cudaEventRecord(event, stream));
      check(cudaStreamWaitEvent(other, event, 0));
      check(cudaMemsetAsync(&value, 0, sizeof value, other));
    } else if (use == "unmatched") {
      check(cudaEventRecord(event, stream));
      check(cudaStreamWaitEvent(other, event, 0));
      error = cudaStreamEndCapture(other, &graph);
    } else if (use == "event") {
      check(cudaEventRecord(event, stream));
      error = cudaEventSynchronize(event);
    }
    const cudaError_t end = cudaStreamEndCapture(stream, &graph);
    if (error == cudaSuccess) error = end;
    if (graph != nullptr) check(cudaGraphDestroy(graph));
  }
  check(cudaEventDestroy(event));
  check(cudaStreamDestroy(other));
  check(cudaStreamDestroy(stream));
  if (use == "destroyed stream") error = cudaMemsetAsync(&value, 0, sizeof value, stream);
  if (value != 0.0f) throw std::runtime_error("work ran during its capture");
  cudaGetLastError();
  return cudaGetErrorName(error);
}

void convert(const std::string& to, uintptr_t in, uintptr_t out, int64_t count) {
  const auto* floats = reinterpret_cast<const float*>(in);
  const auto* bits = reinterpret_cast<const uint16_t*>(in);
  for (int64_t i = 0; i < count; ++i) {
    auto& half = reinterpret_cast<uint16_t*>(out)[i];
    auto& wide = reinterpret_cast<float*>(out)[i];
    if (to == "half") half = static_cast<__half_raw>(__float2half_rn(floats[i])).x;
    if (to == "bfloat") half = static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(floats[i])).x;
    if (to == "tf32") wide = __uint_as_float(ptx::round_tf32(__float_as_uint(floats[i])));
    if (to == "from half") wide = __half2float(__half_raw{bits[i]});
    if (to == "from bfloat") wide = __bfloat162float(__nv_bfloat16_raw{bits[i]});
  }
}

}  // namespace ep::cuda::selftest
