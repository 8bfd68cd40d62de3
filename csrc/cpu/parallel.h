// Splits a pass over samples and rows of samples among the threads of the process.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace ep::cpu {

constexpr int64_t kGrain = 16384;  // elements that a thread should at least get

// f(n, begin, end) over all rows of all samples; a call never spans two samples. row_size: elements of a row.
template <typename F>
void for_each_row(int64_t batch, int64_t rows, int64_t row_size, const F& f) {
  if (batch == 0 || rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(row_size, 1));
  torch::stable::parallel_for(0, batch * rows, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / rows, row = begin % rows;
      const int64_t stop = std::min(rows, row + (end - begin));
      f(n, row, stop);
      begin += stop - row;
    }
  });
}

}  // namespace ep::cpu
