#include "step.h"

#include <algorithm>
#include <vector>

#include "aten.h"
#include "parallel.h"
#include "passes.h"

namespace ep::cpu {
namespace {

// The bias repeated over whole pixels up to about 1,024 elements, so that the pass reads it like any other operand.
template <typename T>
std::vector<T> tile_bias(const Tensor& bias) {
  const int64_t channels = bias.numel();  // > 0: the state is not empty
  std::vector<T> tile(channels * std::max<int64_t>(1, 1024 / channels));
  for (size_t i = 0; i < tile.size(); ++i) tile[i] = data<T>(bias)[i % channels];
  return tile;
}

template <typename T>
void run(const std::vector<Summand>& summands, const Tensor* bias, const Tensor* old, const Tensor* pre, int64_t phases,
         const Dynamics<double>& dynamics, const Tensor& out, const Tensor* pre_out, double* residual) {
  const int64_t batch = out.size(0);
  if (out.numel() == 0) return;
  std::vector<Term<T>> terms;
  for (const Summand& s : summands) {
    terms.push_back({data<T>(s.tensor), s.tensor.size(0), static_cast<T>(s.gain), static_cast<T>(s.second_gain)});
  }
  const int64_t size = out.numel() / batch;
  std::vector<T> tile;
  if (bias) tile = tile_bias<T>(*bias);
  Step<T> a;
  a.terms = terms.data();
  a.count = static_cast<int64_t>(terms.size());
  a.bias = bias ? tile.data() : nullptr;
  a.tile = bias ? static_cast<int64_t>(tile.size()) : 1024;
  a.old = old ? data<T>(*old) : nullptr;
  a.pre = pre ? data<T>(*pre) : nullptr;
  a.pre_batch = pre ? pre->size(0) : 1;
  a.out = mutable_data<T>(out);
  a.pre_out = pre_out ? mutable_data<T>(*pre_out) : nullptr;
  a.size = size;
  a.half = batch / phases;
  a.damping = static_cast<T>(dynamics.damping);
  a.slope = static_cast<T>(dynamics.slope);
  a.lo = static_cast<T>(dynamics.lo);
  a.hi = static_cast<T>(dynamics.hi);
  a.scale = static_cast<T>(dynamics.scale);
  a.form = dynamics.form;

  // fixed chunks of whole tiles, one maximum each: the result does not depend on the number of threads
  const int64_t chunk = std::max<int64_t>(a.tile, kGrain / a.tile * a.tile);
  const int64_t chunks = (size + chunk - 1) / chunk;
  std::vector<T> change(batch * chunks);
  const auto& pass = passes<T>();
  for_each_row(batch, chunks, std::min(size, chunk), [&](int64_t n, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      change[n * chunks + c] = pass.step(a, n, c * chunk, std::min(size, (c + 1) * chunk));
    }
  });
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t c = 0; c < chunks; ++c) {
      const double moved = static_cast<double>(change[n * chunks + c]) / dynamics.scale;
      residual[n] = larger(residual[n], moved);
    }
  }
}

}  // namespace

void step(const std::vector<Summand>& summands, const Tensor* bias, const Tensor* old, const Tensor* pre,
          int64_t phases, const Dynamics<double>& dynamics, const Tensor& out, const Tensor* pre_out,
          double* residual) {
  if (out.scalar_type() == ScalarType::Double) {
    run<double>(summands, bias, old, pre, phases, dynamics, out, pre_out, residual);
  } else {
    run<float>(summands, bias, old, pre, phases, dynamics, out, pre_out, residual);
  }
}

}  // namespace ep::cpu
