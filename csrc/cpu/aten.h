// ATen through the stable dispatcher: the few operators that the kernels leave to oneDNN and BLAS.
#pragma once

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensors.h"

namespace ep::cpu {

inline Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Results have the dtype of their operands, whatever mode (autocast) the dispatcher is in.
namespace aten {

template <size_t N>
void call(const char* op, const char* overload, std::array<StableIValue, N>& stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
}

inline Tensor convolution(const Tensor& x, const Tensor& w, const Ints& stride, const Ints& padding, bool transposed,
                          const Ints& output_padding) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{
      from(x),          from(w),          from(std::optional<Tensor>()), from(stride),    from(padding),
      from(Ints{1, 1}), from(transposed), from(output_padding),          from(int64_t{1})};
  call("aten::convolution", "", stack);
  return cast(torch::stable::detail::to<Tensor>(stack[0]), x.scalar_type());
}

// Every stride-th row and column of a map.
inline Tensor sampled(Tensor map, const Ints& stride) {
  using torch::stable::detail::from;
  for (int64_t axis : {0, 1}) {
    std::array<StableIValue, 5> stack{from(map), from(axis + 2), from(std::optional<int64_t>()),
                                      from(std::optional<int64_t>()), from(stride[axis])};
    call("aten::slice", "Tensor", stack);
    map = torch::stable::detail::to<Tensor>(stack[0]);
  }
  return map;
}

// Gradient of a convolution's weight: sum over samples of `above` (x) `below`.
inline Tensor convolution_weight(const Tensor& above, const Tensor& below, const Tensor& w, const Ints& stride,
                                 const Ints& padding) {
  using torch::stable::detail::from;
  // of a strided 1x1 convolution oneDNN 3.12 (torch 2.13.0) writes out of bounds: channels_last and few channels
  if (w.size(2) == 1 && w.size(3) == 1 && padding == Ints{0, 0} && stride != Ints{1, 1}) {
    return convolution_weight(above, sampled(below, stride), w, {1, 1}, padding);
  }
  static constexpr bool kWeightOnly[] = {false, true, false};
  std::array<StableIValue, 11> stack{from(above),
                                     from(below),
                                     from(w),
                                     from(std::optional<Ints>()),
                                     from(stride),
                                     from(padding),
                                     from(Ints{1, 1}),
                                     from(false),
                                     from(Ints{0, 0}),
                                     from(int64_t{1}),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(kWeightOnly, 3))};
  call("aten::convolution_backward", "", stack);
  for (size_t i : {0, 2}) torch::stable::detail::to<Tensor>(stack[i]);  // undefined: release the handles
  return cast(torch::stable::detail::to<Tensor>(stack[1]), w.scalar_type());
}

inline Tensor matmul(const Tensor& a, const Tensor& b) { return cast(torch::stable::matmul(a, b), a.scalar_type()); }

inline Tensor transpose(const Tensor& a) { return torch::stable::transpose(a, 0, 1); }

inline Tensor adaptive_avg_pool(const Tensor& x, int64_t size) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(x), from(Ints{size, size})};
  call("aten::_adaptive_avg_pool2d", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor adaptive_avg_pool_adjoint(const Tensor& gradient, const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(gradient), from(x)};
  call("aten::_adaptive_avg_pool2d_backward", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor as_strided(const Tensor& x, const Ints& size, const Ints& stride) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(size), from(stride), from(std::optional<int64_t>())};
  call("aten::as_strided", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace aten

// ---- dense tensors: NHWC maps, [B, F] vectors -----------------------------------------------------------------------

// The tensor itself when it is already dense in the layout of the passes, else a copy that is. One channel, or one
// pixel, is dense in both layouts: its strides then say channels_last too, which oneDNN follows in what it returns.
inline Tensor dense(const Tensor& t) {
  using torch::headeronly::MemoryFormat;
  if (t.dim() != 4) return torch::stable::contiguous(t, MemoryFormat::Contiguous);
  const Tensor map = torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
  const int64_t channels = map.size(1), width = map.size(3);
  if (map.numel() == 0 || (map.stride(1) == 1 && map.stride(3) == channels)) return map;
  return aten::as_strided(map, sizes(map), {map.size(2) * width * channels, 1, width * channels, channels});
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f(T{}) with float or double.
template <typename F>
auto dispatch(ScalarType dtype, const F& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace ep::cpu
