// Passes over states in memory: everything of a relaxation that is not a convolution. Maps are dense NHWC
// (channels_last), vectors [B, F] are maps of one pixel. passes.cpp is compiled once per instruction set;
// passes() returns the table of the best one that this processor runs.
#pragma once

#include <cstdint>

#include "ep/elementwise.h"

namespace ep::cpu {

// One summand of a pre-activation: gain * data[n % batch]; samples of the second phase take second_gain.
template <typename T>
struct Term {
  const T* data;
  int64_t batch;
  T gain;
  T second_gain;  // gain of samples in the second phase
};

// One relaxation step of one node. A sample is `size` elements, channels innermost.
template <typename T>
struct Step {
  const Term<T>* terms;
  int64_t count;
  const T* bias;  // [tile], the bias repeated to a multiple of the channels, or null
  int64_t tile;
  const T* old;  // [batch, size] or null for zero
  const T* pre;  // [pre_batch, size], gamma a at the free equilibrium (delta forms)
  int64_t pre_batch;
  T* out;      // may alias old
  T* pre_out;  // gamma a, or null
  int64_t size;
  int64_t half;  // samples from here on are in the second phase
  T damping, slope, lo, hi, scale;
  Form form;
};

// 2x2 windows of a map: [height, width, channels] -> [height / 2, width / 2, channels].
struct Windows {
  int64_t height, width, channels;
  int64_t rows() const { return height / 2; }
  int64_t columns() const { return width / 2; }
  int64_t map_size() const { return height * width * channels; }
  int64_t pooled_size() const { return rows() * columns() * channels; }
};

// Difference and mean of two phases at one end of a connection (one sample).
template <typename T>
struct Contrast {
  const T* free;
  const T* plus;
  const T* minus;     // null: one phase
  T difference_gain;  // difference_gain * (plus - minus) is stored as the difference,
  T mean_gain;        // free + mean_gain * (plus + minus) as the mean
};

// Instruction-set table. T is float or double.
template <typename T>
struct Table {
  // Elements [begin, end) of sample n, begin a multiple of tile; returns max |new - old| (in scaled units).
  T (*step)(const Step<T>&, int64_t n, int64_t begin, int64_t end);
  // Rows [begin, end) of the pooled map of one sample.
  void (*max_pool)(const Windows&, const T* map, T* pooled, uint8_t* winners, int64_t begin, int64_t end);
  void (*gather_pool)(const Windows&, const T* map, const uint8_t* winners, T* pooled, int64_t begin, int64_t end);
  void (*avg_pool)(const Windows&, const T* map, T* pooled, int64_t begin, int64_t end);
  // The adjoints; winners null: average. An odd last row or column is zeroed with the last pooled one.
  void (*unpool)(const Windows&, const T* pooled, const uint8_t* winners, T* map, int64_t begin, int64_t end);
  // difference (scaled) and mean of one sample of `size` elements; adds the difference, times
  // difference_scale, per channel to sums[channels] unless null. difference may be null.
  void (*contrast)(const Contrast<T>&, int64_t size, int64_t channels, T* difference, T* mean, T* sums);
};

template <typename T>
const Table<T>& passes();

const char* passes_isa();

}  // namespace ep::cpu
