// What the gradient of a head needs besides its two matrix products (reference: `head_gradient`).
#include "launch.cuh"
#include "values.cuh"

namespace ep::cuda {
namespace {

constexpr int kThreads = 256;

// Cell i of `cells` adaptive averages over `size`: [begin, end), as torch.nn.functional.adaptive_avg_pool2d has it.
__device__ inline int32_t cell_begin(int32_t i, int32_t size, int32_t cells) {
  return static_cast<int32_t>(static_cast<int64_t>(i) * size / cells);
}
__device__ inline int32_t cell_end(int32_t i, int32_t size, int32_t cells) {
  return static_cast<int32_t>((static_cast<int64_t>(i + 1) * size + cells - 1) / cells);
}

__global__ void __launch_bounds__(kThreads, 1) feature_kernel(const __grid_constant__ HeadFeature f) {
  if (stopped(f.control)) return;
  const uint32_t groups = f.channels / 4;
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(f.n) * f.rows * f.columns * groups) return;
  const int32_t position = i / groups, channel = i % groups * 4;
  const int32_t column = position % f.columns, row = position / f.columns % f.rows;
  const int64_t n = position / (f.columns * f.rows);
  const int32_t top = cell_begin(row, f.height, f.rows), bottom = cell_end(row, f.height, f.rows);
  const int32_t left = cell_begin(column, f.width, f.columns), right = cell_end(column, f.width, f.columns);
  Four total{};
  for (int32_t y = top; y < bottom; ++y) {
    for (int32_t x = left; x < right; ++x) {
      const int64_t pixel = static_cast<int64_t>(y) * f.width + x, map = static_cast<int64_t>(f.height) * f.width;
      Four s{};
      if (f.state) s = load4(f.state, f.state_type, (n * map + pixel) * f.channels + channel);
      if (f.free) {
        const Four free = load4(f.free, (n % f.free_samples * map + pixel) * f.channels + channel);
#pragma unroll
        for (int j = 0; j < 4; ++j) s.x[j] = free.x[j] + f.inverse_scale * s.x[j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) total.x[j] += s.x[j];
    }
  }
  const float pixels = static_cast<float>((bottom - top) * (right - left));
#pragma unroll
  for (int j = 0; j < 4; ++j) total.x[j] /= pixels;
  store4(f.feature, int64_t{4} * i, total);
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// A warp for each sample and position.
__global__ void __launch_bounds__(kThreads, 1) error_kernel(const __grid_constant__ HeadError e) {
  if (stopped(e.control)) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(e.n) * e.positions) return;
  const int64_t per_target = static_cast<int64_t>(e.target_samples) * e.positions;
  float* z = e.outputs + row * e.channels;
  const float* target = e.target + row % per_target * e.channels;
  const auto output = [&](int c) { return z[c] + (e.bias ? e.bias[c] : 0.0f); };
  if (e.loss == Loss::kCosine) {
    float z_square = 0.0f, target_square = 0.0f, product = 0.0f;
    for (int c = lane; c < e.real_channels; c += 32) {
      const float value = output(c);
      z_square += value * value;
      target_square += target[c] * target[c];
      product += value * target[c];
    }
    z_square = warp_sum(z_square);
    target_square = warp_sum(target_square);
    product = warp_sum(product);
    const CosineError<float> error = cosine_error(z_square, target_square, product, e.factor);
    for (int c = lane; c < e.channels; c += 32) {
      z[c] = c < e.real_channels ? error.z_factor * output(c) + error.target_factor * target[c] : 0.0f;
    }
    return;
  }
  const bool softmax = e.loss == Loss::kCrossEntropy;
  float top = -INFINITY, total = 1.0f;
  if (softmax) {
    for (int c = lane; c < e.real_channels; c += 32) top = fmaxf(top, output(c) / e.temperature);
    top = warp_max(top);
    float part = 0.0f;
    for (int c = lane; c < e.real_channels; c += 32) part += expf(output(c) / e.temperature - top);
    total = warp_sum(part);
  }
  for (int c = lane; c < e.channels; c += 32) {
    const float value = softmax ? expf(output(c) / e.temperature - top) / total : output(c);
    z[c] = c < e.real_channels ? e.factor * (value - target[c]) : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads, 1) spread_kernel(const __grid_constant__ HeadSpread s) {
  if (stopped(s.control)) return;
  const uint32_t groups = s.channels / 4;
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(s.n) * s.height * s.width * groups) return;
  const int32_t position = i / groups, channel = i % groups * 4;
  const int32_t x = position % s.width, y = position / s.width % s.height;
  const int64_t n = position / (s.width * s.height);
  Four total{};
  if (s.add) total = load4(s.total, int64_t{4} * i);
  for (int32_t row = cell_begin(y, s.rows, s.height); row < s.rows && cell_begin(row, s.height, s.rows) <= y; ++row) {
    const int32_t top = cell_begin(row, s.height, s.rows), bottom = cell_end(row, s.height, s.rows);
    if (y >= bottom) continue;
    for (int32_t column = cell_begin(x, s.columns, s.width);
         column < s.columns && cell_begin(column, s.width, s.columns) <= x; ++column) {
      const int32_t left = cell_begin(column, s.width, s.columns), right = cell_end(column, s.width, s.columns);
      if (x >= right) continue;
      const float pixels = static_cast<float>((bottom - top) * (right - left));
      const Four part = load4(s.feature, ((n * s.rows + row) * s.columns + column) * s.channels + channel);
#pragma unroll
      for (int j = 0; j < 4; ++j) total.x[j] += part.x[j] / pixels;
    }
  }
  store4(s.total, int64_t{4} * i, total);
}

}  // namespace

void launch(const HeadFeature& f, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(f.n) * f.rows * f.columns * (f.channels / 4);
  launch_kernel(&feature_kernel, blocks_for(items, kThreads), kThreads, 0, stream, f);
}

void launch(const HeadError& e, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(e.n) * e.positions;
  launch_kernel(&error_kernel, blocks_for(rows, kThreads / 32), kThreads, 0, stream, e);
}

void launch(const HeadSpread& s, cudaStream_t stream) {
  const int64_t items = static_cast<int64_t>(s.n) * s.height * s.width * (s.channels / 4);
  launch_kernel(&spread_kernel, blocks_for(items, kThreads), kThreads, 0, stream, s);
}

}  // namespace ep::cuda
