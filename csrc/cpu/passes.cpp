// Compiled once per instruction set with -DEP_ISA=baseline|avx2|avx512; the compiler vectorises the channel loops.
#include "passes.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ep/pool.h"

#ifndef EP_ISA
#define EP_ISA baseline
#endif

namespace ep::cpu::EP_ISA {
namespace {

constexpr int64_t kBlock = 512;  // accumulators of one block stay in the first-level cache

template <typename T, Form form>
T step_form(const Step<T>& a, int64_t n, int64_t begin, int64_t end) {
  alignas(64) T sum[kBlock];
  alignas(64) static constexpr T zero[kBlock] = {};
  const bool second = n >= a.half;
  const T* old = a.old ? a.old + n * a.size : nullptr;
  const T* pre = form == Form::kStates ? nullptr : a.pre + (n % a.pre_batch) * a.size;
  T* out = a.out + n * a.size;
  T* pre_out = a.pre_out ? a.pre_out + n * a.size : nullptr;
  const T eta = a.damping, slope = a.slope, lo = a.lo, hi = a.hi, scale = a.scale;
  T change = 0;
  for (int64_t at = begin; at < end;) {
    const int64_t in_tile = a.bias ? at % a.tile : 0;
    int64_t length = std::min(kBlock, end - at);
    if (a.bias) length = std::min(length, a.tile - in_tile);
    if (a.bias) {
      const T* bias = a.bias + in_tile;
      for (int64_t i = 0; i < length; ++i) sum[i] = bias[i];
    } else {
      for (int64_t i = 0; i < length; ++i) sum[i] = 0;
    }
    for (int64_t t = 0; t < a.count; ++t) {
      const Term<T>& term = a.terms[t];
      const T* data = term.data + (n % term.batch) * a.size + at;
      const T gain = second ? term.second_gain : term.gain;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) sum[i] += gain * data[i];
    }
    // short loops over a block in the first-level cache: each vectorises, none branches inside
    for (int64_t i = 0; i < length; ++i) sum[i] *= slope;
    if (pre_out) std::copy_n(sum, length, pre_out + at);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      if constexpr (form == Form::kStates) {
        sum[i] = clamp(sum[i], lo, hi);
      } else if constexpr (form == Form::kDelta) {
        sum[i] = delta_clip(pre[at + i], sum[i], lo, hi, scale);
      } else {
        sum[i] = tangent_clip(pre[at + i], sum[i], lo, hi);
      }
    }
    if (eta != T(1)) {
      if (old) {
        for (int64_t i = 0; i < length; ++i) sum[i] = damp(old[at + i], sum[i], eta);
      } else {
        for (int64_t i = 0; i < length; ++i) sum[i] *= eta;
      }
      if (eta > T(1)) {
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) sum[i] = clamp(sum[i], lo, hi);
      }
    }
    const T* before = old ? old + at : zero;
    T block_change = 0;
    int32_t undefined = 0;  // a maximum loses NaN: counted apart
#pragma omp simd reduction(max : block_change) reduction(| : undefined)
    for (int64_t i = 0; i < length; ++i) {
      const T moved = std::abs(sum[i] - before[i]);
      block_change = block_change < moved ? moved : block_change;
      undefined |= moved != moved;
    }
    if (undefined) block_change = std::numeric_limits<T>::quiet_NaN();
    std::copy_n(sum, length, out + at);
    change = larger(change, block_change);
    at += length;
  }
  return change;
}

template <typename T>
T step(const Step<T>& a, int64_t n, int64_t begin, int64_t end) {
  switch (a.form) {
    case Form::kDelta:
      return step_form<T, Form::kDelta>(a, n, begin, end);
    case Form::kTangent:
      return step_form<T, Form::kTangent>(a, n, begin, end);
    default:
      return step_form<T, Form::kStates>(a, n, begin, end);
  }
}

// Calls f(z0, z1, z2, z3, offset of the pooled pixel) for every window of pooled rows [begin, end): pointers to the
// window's four pixels in row-major order.
template <typename T, typename F>
inline void each_window(const Windows& w, T* map, int64_t begin, int64_t end, const F& f) {
  const int64_t line = w.width * w.channels;
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t x = 0; x < w.columns(); ++x) {
      T* corner = map + 2 * y * line + 2 * x * w.channels;
      f(corner, corner + w.channels, corner + line, corner + line + w.channels, (y * w.columns() + x) * w.channels);
    }
  }
}

template <typename T>
void max_pool(const Windows& w, const T* map, T* pooled, uint8_t* winners, int64_t begin, int64_t end) {
  each_window(w, map, begin, end, [&](const T* z0, const T* z1, const T* z2, const T* z3, int64_t at) {
    T* out = pooled + at;
    uint8_t* win = winners + at;
#pragma omp simd
    for (int64_t c = 0; c < w.channels; ++c) {
      int32_t index;
      out[c] = largest(z0[c], z1[c], z2[c], z3[c], index);
      win[c] = static_cast<uint8_t>(index);
    }
  });
}

template <typename T>
void gather_pool(const Windows& w, const T* map, const uint8_t* winners, T* pooled, int64_t begin, int64_t end) {
  each_window(w, map, begin, end, [&](const T* z0, const T* z1, const T* z2, const T* z3, int64_t at) {
    T* out = pooled + at;
    const uint8_t* win = winners + at;
#pragma omp simd
    for (int64_t c = 0; c < w.channels; ++c) out[c] = gathered(win[c], z0[c], z1[c], z2[c], z3[c]);
  });
}

template <typename T>
void avg_pool(const Windows& w, const T* map, T* pooled, int64_t begin, int64_t end) {
  each_window(w, map, begin, end, [&](const T* z0, const T* z1, const T* z2, const T* z3, int64_t at) {
    T* out = pooled + at;
#pragma omp simd
    for (int64_t c = 0; c < w.channels; ++c) out[c] = average(z0[c], z1[c], z2[c], z3[c]);
  });
}

template <typename T>
void unpool(const Windows& w, const T* pooled, const uint8_t* winners, T* map, int64_t begin, int64_t end) {
  each_window(w, map, begin, end, [&](T* z0, T* z1, T* z2, T* z3, int64_t at) {
    const T* s = pooled + at;
    if (winners) {
      const uint8_t* win = winners + at;
#pragma omp simd
      for (int64_t c = 0; c < w.channels; ++c) {
        const T value = s[c];
        const uint8_t index = win[c];
        z0[c] = share_of(index, 0, value);
        z1[c] = share_of(index, 1, value);
        z2[c] = share_of(index, 2, value);
        z3[c] = share_of(index, 3, value);
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < w.channels; ++c) z0[c] = z1[c] = z2[c] = z3[c] = average_share(s[c]);
    }
  });
  const int64_t line = w.width * w.channels;
  if (w.width % 2) {
    for (int64_t y = 2 * begin; y < 2 * end; ++y) std::fill_n(map + (y + 1) * line - w.channels, w.channels, T(0));
  }
  if (w.height % 2 && end == w.rows()) std::fill_n(map + (w.height - 1) * line, line, T(0));
}

template <typename T>
void contrast(const Contrast<T>& a, int64_t size, int64_t channels, T* difference, T* mean, T* sums) {
  const T difference_gain = a.difference_gain, mean_gain = a.mean_gain;
  for (int64_t at = 0; at < size; at += channels) {
    const T* free = a.free + at;
    const T* plus = a.plus + at;
    const T* minus = a.minus ? a.minus + at : nullptr;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      T d, m;
      difference_and_mean(free[c], plus[c], minus ? minus[c] : T(0), difference_gain, mean_gain, d, m);
      if (sums) sums[c] += d;
      if (difference) difference[at + c] = d;
      if (mean) mean[at + c] = m;
    }
  }
}

template <typename T>
constexpr Table<T> kTable = {&step<T>, &max_pool<T>, &gather_pool<T>, &avg_pool<T>, &unpool<T>, &contrast<T>};

}  // namespace

const Table<float>& table_float() { return kTable<float>; }
const Table<double>& table_double() { return kTable<double>; }

}  // namespace ep::cpu::EP_ISA
