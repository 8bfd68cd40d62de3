// A drive through the C++ interface: a 1x1 convolution of the map 6 7 / 8 9 by 2, max-pooled to its last pixel.
#include <ep/ops.h>
#include <torch/csrc/stable/ops.h>

#include <cstdio>
#include <stdexcept>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor tensor(const std::vector<int64_t>& shape, const std::vector<float>& values) {
  Tensor t = torch::stable::empty(shape, ScalarType::Float);
  for (size_t i = 0; i < values.size(); ++i) static_cast<float*>(t.mutable_data_ptr())[i] = values[i];
  return t;
}

int main() {
  const Tensor source = tensor({1, 1, 2, 2}, {6, 7, 8, 9}), weight = tensor({1, 1, 1, 1}, {2});
  const auto [drive, winners] = ep::ops::drive(source, weight, {1, 1}, {0, 0}, 1);
  const float value = *static_cast<const float*>(drive.const_data_ptr());
  const int winner = *static_cast<const uint8_t*>(winners.const_data_ptr());
  std::printf("drive %g winner %d\n", value, winner);

  ep::ops::RelaxStep arguments;
  arguments.state = tensor({1, 1}, {0.5f});
  arguments.drives = {tensor({1, 1}, {0.25f})};
  arguments.drive_gains = {3};
  const auto [state, residual, preactivation] = ep::ops::relax_step(arguments);
  std::printf("state %g residual %g\n", *static_cast<const float*>(state.const_data_ptr()),
              *static_cast<const float*>(residual.const_data_ptr()));

  try {
    ep::ops::drive(source, tensor({1}, {2}), {1, 1}, {0, 0}, 1);
  } catch (const std::runtime_error&) {
    std::printf("a weight of one dimension is refused\n");
    return 0;
  }
  return 1;
}
