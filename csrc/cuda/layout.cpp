#include "layout.h"

#include <algorithm>
#include <limits>

#include "ep/check.h"

namespace ep::cuda {
namespace {

struct Strides {
  int64_t of[4];
};

// A copy into the whole of `to`: what lies outside `limit` becomes zero.
Copy copy_of(const void* from, Type type, const Buffer& to, const Ints& limit, const Strides& strides) {
  Copy copy{};
  copy.from = from;
  copy.to = to.data;
  copy.from_type = type;
  copy.to_type = to.type;
  for (int i = 0; i < 4; ++i) {
    copy.size[i] = to.size[i];
    copy.limit[i] = static_cast<int32_t>(limit[i]);
    copy.from_stride[i] = strides.of[i];
  }
  return copy;
}

Strides dense_strides(const int32_t (&size)[4]) {
  const int64_t row = int64_t{size[2]} * size[3];
  return {{size[1] * row, row, size[3], 1}};
}

int64_t element_bytes(Type type) { return type == Type::kFloat ? 4 : type == Type::kByte ? 1 : 2; }

}  // namespace

Extent extent_of(const Ints& shape) {
  const auto at = [&](size_t i) { return static_cast<int32_t>(shape[i]); };
  return shape.size() == 4 ? Extent{at(2), at(3), at(1)} : Extent{1, 1, at(1)};
}

int32_t padded(int64_t channels) { return static_cast<int32_t>((channels + kPad - 1) / kPad * kPad); }

Type type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat;
    case ScalarType::Byte:
      return Type::kByte;
    default:
      return Type::kFloat;
  }
}

ScalarType dtype_of(Type type) {
  switch (type) {
    case Type::kHalf:
      return ScalarType::Half;
    case Type::kBFloat:
      return ScalarType::BFloat16;
    case Type::kByte:
      return ScalarType::Byte;
    default:
      return ScalarType::Float;
  }
}

int64_t Buffer::bytes() const { return elements() * element_bytes(type); }

Buffer new_buffer(const Ints& size, Type type, const Tensor& like, Start start) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t positions = size[0] * size[1] * size[2];
  EP_CHECK(positions <= kMost && size[3] <= kMost, "ep_kernels", "batch",
           "maps of at most 2^31 - 1 positions of as many channels", list(size));
  Tensor tensor = empty({positions * size[3]}, like, dtype_of(type));
  if (start == Start::kZero) torch::stable::zero_(tensor);
  Buffer buffer{tensor, tensor.mutable_data_ptr(), type, {}};
  std::copy(size.begin(), size.end(), buffer.size);
  return buffer;
}

Buffer new_map(int64_t n, const Extent& e, Type type, const Tensor& like, Start start) {
  return new_buffer({n, e.height, e.width, padded(e.channels)}, type, like, start);
}

Buffer new_drive_matrix(const Tensor& weight, const Extent& source, Type type, const Tensor& like, Start start) {
  const int32_t rows = padded(weight.size(0)), columns = padded(source.channels);
  if (weight.dim() == 2) return new_buffer({rows, source.height, source.width, columns}, type, like, start);
  return new_buffer({rows, weight.size(2), weight.size(3), columns}, type, like, start);
}

Buffer new_feedback_matrix(const Tensor& weight, const Extent& source, Type type, const Tensor& like, Start start) {
  const int32_t rows = padded(source.channels), columns = padded(weight.size(0));
  if (weight.dim() == 2) return new_buffer({source.height, source.width, rows, columns}, type, like, start);
  return new_buffer({rows, weight.size(2), weight.size(3), columns}, type, like, start);
}

Copy fill_map(const Tensor& from, const Buffer& to) {
  const Ints size = sizes(from);
  const Extent e = extent_of(size);
  const bool map = size.size() == 4;
  const Strides strides{{from.stride(0), map ? from.stride(2) : 0, map ? from.stride(3) : 0, from.stride(1)}};
  return copy_of(from.const_data_ptr(), type_of(from.scalar_type()), to, {size[0], e.height, e.width, e.channels},
                 strides);
}

Copy fill_drive_matrix(const Tensor& weight, const Extent& source, const Buffer& to) {
  const Type type = type_of(weight.scalar_type());
  const int64_t rows = weight.size(0), row = weight.stride(0), column = weight.stride(1);
  if (weight.dim() == 4) {
    return copy_of(weight.const_data_ptr(), type, to, {rows, weight.size(2), weight.size(3), weight.size(1)},
                   {{row, weight.stride(2), weight.stride(3), column}});
  }
  const int64_t h = source.height, w = source.width;  // features of a map are in the order C, H, W
  return copy_of(weight.const_data_ptr(), type, to, {rows, h, w, source.channels},
                 {{row, w * column, column, h * w * column}});
}

Copy fill_feedback_matrix(const Tensor& weight, const Extent& source, const Buffer& to) {
  const Type type = type_of(weight.scalar_type());
  const int64_t rows = weight.size(0), row = weight.stride(0), column = weight.stride(1);
  if (weight.dim() == 4) {
    return copy_of(weight.const_data_ptr(), type, to, {weight.size(1), weight.size(2), weight.size(3), rows},
                   {{column, weight.stride(2), weight.stride(3), row}});
  }
  const int64_t h = source.height, w = source.width;
  return copy_of(weight.const_data_ptr(), type, to, {h, w, source.channels, rows},
                 {{w * column, column, h * w * column, row}});
}

Copy fill_vector(const Tensor& from, const Buffer& to) {
  return copy_of(from.const_data_ptr(), type_of(from.scalar_type()), to, {1, 1, 1, from.size(0)},
                 {{0, 0, 0, from.stride(0)}});
}

Copy take_map(const Buffer& from, const Tensor& to) {
  const Ints size = sizes(to);
  const Extent e = extent_of(size);
  const Buffer out{to,
                   to.mutable_data_ptr(),
                   type_of(to.scalar_type()),
                   {static_cast<int32_t>(size[0]), e.height, e.width, e.channels}};
  return copy_of(from.data, from.type, out, {size[0], e.height, e.width, e.channels}, dense_strides(from.size));
}

Copy between(const Buffer& from, const Buffer& to) {
  return copy_of(from.data, from.type, to, {to.size[0], to.size[1], to.size[2], to.size[3]}, dense_strides(from.size));
}

Copy zeros(const Buffer& to) { return copy_of(nullptr, to.type, to, {0, 0, 0, 0}, {}); }

Copy repeat(const Buffer& one, const Buffer& to) {
  return copy_of(one.data, one.type, to, {to.size[0], to.size[1], to.size[2], to.size[3]}, {});
}

void launch(const std::vector<Copy>& copies, cudaStream_t stream) {
  Copies group{};
  for (const Copy& copy : copies) {
    if (std::any_of(copy.size, copy.size + 4, [](int32_t n) { return n == 0; })) continue;
    group.copy[group.count++] = copy;
    if (group.count < kMaxCopies) continue;
    launch(group, stream);
    group.count = 0;
  }
  if (group.count > 0) launch(group, stream);
}

}  // namespace ep::cuda
