// Tensors as the kernels want them: dense [N, H, W, C] buffers with padded channels, K-major matrices, and the copies
// that fill them and take results out. A vector is a map of one position.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/tensors.h"
#include "kernels.h"

namespace ep::cuda {

// Of a node or drive: real channels.
struct Extent {
  int32_t height, width, channels;
};

Extent extent_of(const Ints& shape);  // [B, C, H, W] or [B, F]
int32_t padded(int64_t channels);
Type type_of(ScalarType dtype);
ScalarType dtype_of(Type type);

// Dense memory of 4 dimensions: a map [N, H, W, C], or a matrix [rows, kh, kw, C].
struct Buffer {
  Tensor tensor;  // flat: keeps the memory
  void* data;
  Type type;
  int32_t size[4];

  int64_t sample() const { return int64_t{size[1]} * size[2] * size[3]; }
  int64_t elements() const { return size[0] * sample(); }
  int64_t bytes() const;
  float* floats() const { return static_cast<float*>(data); }
  uint8_t* winners() const { return static_cast<uint8_t*>(data); }
};

// What a buffer holds at first: kAny is for those of which a launch or a copy writes every element, padding included.
enum class Start { kZero, kAny };

// On the device of `like`. Raises where the kernels' 31-bit indices of positions do not reach.
Buffer new_buffer(const Ints& size, Type type, const Tensor& like, Start start = Start::kZero);
Buffer new_map(int64_t n, const Extent& extent, Type type, const Tensor& like, Start start = Start::kZero);
// Of a weight [C_dst, C_src, kh, kw]: [C_dst, kh, kw, C_src]; of [F_dst, F_src]: [F_dst, H, W, C_src].
Buffer new_drive_matrix(const Tensor& weight, const Extent& source, Type type, const Tensor& like,
                        Start start = Start::kZero);
// [C_src, kh, kw, C_dst]; of a linear weight [H, W, C_src, F_dst], a row for each feature of the source's buffer.
Buffer new_feedback_matrix(const Tensor& weight, const Extent& source, Type type, const Tensor& like,
                           Start start = Start::kZero);

// From tensors of any strides.
Copy fill_map(const Tensor& from, const Buffer& to);
Copy fill_drive_matrix(const Tensor& weight, const Extent& source, const Buffer& to);
Copy fill_feedback_matrix(const Tensor& weight, const Extent& source, const Buffer& to);
Copy fill_vector(const Tensor& from, const Buffer& to);  // [C] into [1, 1, 1, C]
// To tensors that `empty` made: channels_last maps, vectors.
Copy take_map(const Buffer& from, const Tensor& to);
Copy between(const Buffer& from, const Buffer& to);  // of the same size
Copy zeros(const Buffer& to);
Copy repeat(const Buffer& one, const Buffer& to);  // its single element

// All copies, several in a launch.
void launch(const std::vector<Copy>& copies, cudaStream_t stream);

}  // namespace ep::cuda
