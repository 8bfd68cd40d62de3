// torch.ops.ep_kernels.contrast: differences and means of both ends, one GEMM over positions, sums in a fixed order.
#include <algorithm>

#include "../common/arguments.h"
#include "layout.h"
#include "ops.h"
#include "place.h"

namespace ep::cuda {
namespace {

// d and m of one end, unpooled where the connection pools, in the operands' type; partial sums of d.
struct End {
  std::optional<Buffer> difference;
  Buffer mean;
  std::optional<Buffer> sums;
};

struct EndArguments {
  const Tensor& free;
  const Tensor& delta;
  Pool pool;
  const Tensor* winners;  // of max pooling: of the free states, or live of both phases
  Ints size;              // of the map before pooling
  double gain, centre;
  bool sums;
};

End end_of(const EndArguments& a, Type type, const Place& place) {
  const Extent extent = extent_of(sizes(a.free));
  const int64_t batch = a.free.size(0);
  const Type own = type_of(a.free.scalar_type());
  const Buffer free = new_map(batch, extent, own, a.free, Start::kAny);
  const Buffer delta = new_map(a.delta.size(0), extent, own, a.free, Start::kAny);
  std::vector<Copy> copies{fill_map(a.free, free), fill_map(a.delta, delta)};
  const Extent map{static_cast<int32_t>(a.size[0]), static_cast<int32_t>(a.size[1]), extent.channels};
  // an odd last row or column is in no window
  const bool odd = a.pool != Pool::kNone && (map.height % 2 != 0 || map.width % 2 != 0);
  const Start start = odd ? Start::kZero : Start::kAny;
  const Buffer difference = new_map(batch, map, type, a.free, start), mean = new_map(batch, map, type, a.free, start);
  Difference d{};
  std::optional<Buffer> won, sums;
  if (a.winners) {
    const int64_t given = a.winners->size(0);
    won = new_map(std::max(given, batch), extent, Type::kByte, a.free, Start::kAny);
    for (int64_t n = 0; n < won->size[0]; n += given) {  // fewer samples than the states have are repeated
      Buffer part = *won;
      part.data = won->winners() + n * won->sample();
      part.size[0] = static_cast<int32_t>(given);
      copies.push_back(fill_map(*a.winners, part));
    }
    d.winners = won->winners();
    d.winners_samples = won->size[0];
  }
  launch(copies, place.stream());
  d.free = free.data;
  d.delta = delta.data;
  d.free_type = d.delta_type = own;
  d.phases = a.delta.size(0) == batch ? 1 : 2;
  d.pool = a.pool;
  d.difference = difference.data;
  d.mean = mean.data;
  d.type = type;
  d.map_height = map.height;
  d.map_width = map.width;
  d.n = free.size[0];
  d.height = free.size[1];
  d.width = free.size[2];
  d.channels = free.size[3];
  d.gain = static_cast<float>(a.gain);
  d.mean_gain = static_cast<float>(a.centre * a.gain);
  const int64_t positions = batch * extent.height * extent.width;
  d.blocks = static_cast<int32_t>(std::min<int64_t>((positions + 63) / 64, 2 * place.device().processors));
  if (a.sums) {
    sums = new_buffer({1, 1, d.blocks, d.channels}, Type::kFloat, a.free, Start::kAny);
    d.sums = sums->floats();
  }
  launch(d, place.stream());
  return {difference, mean, sums};
}

// Of a weight [C_dst, C_src, kh, kw] from [C_dst, kh, kw, C_src], or [F_dst, F_src] whose features are those of a map.
Copy take_weight(const Buffer& from, const Tensor& weight, const Extent& source) {
  if (weight.dim() == 4) return take_map(from, weight);
  const int32_t rows = static_cast<int32_t>(weight.size(0));
  Copy copy{};
  copy.from = from.data;
  copy.to = weight.mutable_data_ptr();
  copy.from_type = from.type;
  copy.to_type = type_of(weight.scalar_type());
  const int32_t size[4] = {rows, source.channels, source.height, source.width};
  std::copy(size, size + 4, copy.size);
  std::copy(size, size + 4, copy.limit);
  const int64_t padded_channels = padded(source.channels);
  const int64_t stride[4] = {source.height * source.width * padded_channels, 1, source.width * padded_channels,
                             padded_channels};
  std::copy(stride, stride + 4, copy.from_stride);
  return copy;
}

}  // namespace

std::tuple<Tensor, Tensor> contrast(const Tensor& source, const std::optional<Tensor>& source_delta,
                                    const Tensor& target, const Tensor& target_delta, const Ints& weight_shape,
                                    const Ints& stride, const Ints& padding, int64_t pool,
                                    const std::optional<Tensor>& winners, double source_gain, double target_gain,
                                    double centre, double scale, int64_t operands) {
  const ContrastGeometry checked =
      check_contrast(kRules, {source, source_delta, target, target_delta, weight_shape, stride, padding, pool, winners,
                              source_gain, target_gain, centre, scale, operands});
  const Geometry& g = checked.geometry;
  Tensor weight = empty(weight_shape, source), bias = empty({weight_shape[0]}, source);
  if (source.size(0) == 0) {
    torch::stable::zero_(weight);
    torch::stable::zero_(bias);
    return {weight, bias};
  }
  const Place place(source);
  const Products products = products_of(type_of(source.scalar_type()), operands);
  const Type type = operand_type(products);
  const Extent from = extent_of(sizes(source)), to = extent_of(checked.driven);
  const Ints map = g.linear ? Ints{1, 1} : g.map_size(sizes(source), weight_shape);
  const bool max = g.pool == Pool::kMax;
  const End above =
      end_of({target, target_delta, g.pool, max ? &*winners : nullptr, map, target_gain, centre, true}, type, place);
  const End below = [&]() -> End {
    if (source_delta) {
      return end_of(
          {source, *source_delta, Pool::kNone, nullptr, {from.height, from.width}, source_gain, centre, false}, type,
          place);
    }
    const Buffer clamped = new_map(source.size(0), from, type, source, Start::kAny);
    launch(std::vector<Copy>{fill_map(source, clamped)}, place.stream());
    return {std::nullopt, clamped, std::nullopt};
  }();

  // the gains and the scale multiply the products: no short exponent holds them
  const bool moving = below.difference && source_gain != 0;
  const double above_gain = checked.live ? 1.0 : target_gain;  // live differences are those of the states already
  const double last = moving ? source_gain : above_gain;
  Contrast c{};
  c.difference_above = above.difference->data;
  c.mean_below = below.mean.data;
  c.mean_above = moving ? above.mean.data : nullptr;
  c.difference_below = moving ? below.difference->data : nullptr;
  c.ratio = moving ? static_cast<float>(above_gain / last) : 1.0f;
  c.n = static_cast<int32_t>(source.size(0));
  c.height = static_cast<int32_t>(map[0]);
  c.width = static_cast<int32_t>(map[1]);
  c.rows = padded(to.channels);
  if (g.linear) {
    c.below_height = c.below_width = c.kernel_h = c.kernel_w = c.stride_h = c.stride_w = 1;
    c.columns = static_cast<int32_t>(below.mean.sample());
  } else {
    c.below_height = from.height;
    c.below_width = from.width;
    c.columns = padded(from.channels);
    c.kernel_h = static_cast<int32_t>(weight_shape[2]);
    c.kernel_w = static_cast<int32_t>(weight_shape[3]);
    c.stride_h = static_cast<int32_t>(stride[0]);
    c.stride_w = static_cast<int32_t>(stride[1]);
    c.padding_h = static_cast<int32_t>(padding[0]);
    c.padding_w = static_cast<int32_t>(padding[1]);
  }
  const int64_t floats = split(c, products, place.device());
  const Buffer partial = new_buffer({1, 1, c.splits, floats / c.splits}, Type::kFloat, source, Start::kAny);
  c.partial = partial.floats();
  launch(c, products, place.stream());

  const Buffer weights = new_buffer({c.rows, c.kernel_h, c.kernel_w, c.columns}, Type::kFloat, source, Start::kAny);
  launch(Sum{partial.floats(), c.splits, weights.elements(), static_cast<float>(scale * last), weights.floats()},
         place.stream());
  const Buffer biases = new_buffer({1, 1, 1, c.rows}, Type::kFloat, source, Start::kAny);
  launch(
      Sum{above.sums->floats(), above.sums->size[2], c.rows, static_cast<float>(scale * target_gain), biases.floats()},
      place.stream());
  const Buffer bias_out{bias, bias.mutable_data_ptr(), type_of(bias.scalar_type()), {1, 1, 1, to.channels}};
  launch(std::vector<Copy>{take_weight(weights, weight, from), between(biases, bias_out)}, place.stream());
  return {weight, bias};
}

}  // namespace ep::cuda
