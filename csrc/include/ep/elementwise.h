// The element-wise mathematics of a relaxation step, once for every backend. Equations: docs/concepts.md.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define EP_HD __host__ __device__
#else
#define EP_HD
#endif

namespace ep {

// Unknown of a relaxation: the states s; the delta d = s - s_free, clipped by cases; or its limit for small beta.
enum class Form : int64_t { kStates = 0, kDelta = 1, kTangent = 2 };

enum class Pool : int64_t { kNone = 0, kMax = 1, kAvg = 2 };

enum class Loss : int64_t { kCrossEntropy = 0, kMse = 1, kCosine = 2 };

template <typename T>
EP_HD inline T clamp(T x, T lo, T hi) {
  const T low = x < lo ? lo : x;  // a NaN passes through both
  return low > hi ? hi : low;
}

// scale * (clip(pre + increment / scale) - clip(pre)), never adding the small increment to pre:
// inside the box it is the increment itself, cut at the distances to the two bounds.
template <typename T>
EP_HD inline T delta_clip(T pre, T increment, T lo, T hi, T scale) {
  const T below = (lo - pre) * scale;
  const T above = (hi - pre) * scale;
  const T width = (hi - lo) * scale;
  const T inside = clamp(increment, below, above);
  const T under = clamp(increment - below, T(0), width);
  const T over = clamp(increment - above, -width, T(0));
  return pre < lo ? under : (pre > hi ? over : (pre == pre ? inside : pre));  // a NaN on either side comes out
}

// Limit of delta_clip for a small increment: it passes strictly inside the box and nowhere else (a NaN increment does).
template <typename T>
EP_HD inline T tangent_clip(T pre, T increment, T lo, T hi) {
  return (pre > lo) & (pre < hi) ? increment : increment * T(0);
}

// (1 - eta) * old + eta * target, with eta = 1 exact.
template <typename T>
EP_HD inline T damp(T old, T target, T eta) {
  return (T(1) - eta) * old + eta * target;
}

// Of the cosine loss: a vector with at most this norm has no direction, and gets no gradient.
constexpr double kNoDirection = 1e-6;

// The cosine loss differentiated by z: error = z_factor z + target_factor t, from |z|^2, |t|^2 and <z, t>.
template <typename T>
struct CosineError {
  T z_factor, target_factor;
};

template <typename T>
EP_HD inline CosineError<T> cosine_error(T z_square, T target_square, T product, T weight) {
  const T least = T(kNoDirection) * T(kNoDirection);
  const bool found = z_square != z_square || z_square > least;  // a NaN comes out
  const bool wanted = target_square != target_square || target_square > least;
  if (!found || !wanted) return {T(0), T(0)};
  const T norms = sqrt(z_square) * sqrt(target_square);
  return {weight * (product / norms) / z_square, -weight / norms};
}

// Constants of one update of a node.
template <typename T>
struct Dynamics {
  Form form;
  T damping, slope, lo, hi;
  T scale;  // of the node's delta (delta forms)
};

// The new state, or delta, from gamma a: (1 - eta) old + eta clip(gamma a), clipped once more when eta > 1. pre: gamma
// a of the free equilibrium (delta forms).
template <typename T>
EP_HD inline T next_state(const Dynamics<T>& d, T old, T a, T pre) {
  T target;
  if (d.form == Form::kStates) {
    target = clamp(a, d.lo, d.hi);
  } else if (d.form == Form::kDelta) {
    target = delta_clip(pre, a, d.lo, d.hi, d.scale);
  } else {
    target = tangent_clip(pre, a, d.lo, d.hi);
  }
  if (d.damping == T(1)) return target;
  target = damp(old, target, d.damping);
  return d.damping > T(1) ? clamp(target, d.lo, d.hi) : target;
}

// d = difference_gain (d+ - d-) and m = s + mean_gain (d+ + d-); with one phase, d- is zero.
template <typename T>
EP_HD inline void difference_and_mean(T free, T plus, T minus, T difference_gain, T mean_gain, T& difference, T& mean) {
  difference = difference_gain * (plus - minus);
  mean = free + mean_gain * (plus + minus);
}

// Maximum in which NaN wins, whichever side it is on.
template <typename T>
EP_HD inline T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

}  // namespace ep
