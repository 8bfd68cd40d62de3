#include "checks.h"

#include <cmath>

namespace ep {

void check_floating(const char* op, const Rules& rules, const char* argument, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  EP_CHECK(rules.takes(dtype), op, argument, rules.dtypes, torch::headeronly::toString(dtype));
}

void check_shape(const char* op, const char* argument, const Ints& shape, const Ints& expected) {
  EP_CHECK(shape == expected, op, argument, "shape " << list(expected), list(shape));
}

void check_like(const char* op, const char* argument, const Tensor& tensor, const Ints& shape, const Tensor& like) {
  check_shape(op, argument, sizes(tensor), shape);
  EP_CHECK(tensor.scalar_type() == like.scalar_type(), op, argument,
           "dtype " << torch::headeronly::toString(like.scalar_type()),
           torch::headeronly::toString(tensor.scalar_type()));
  check_device(op, argument, tensor, like);
}

void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  const bool same =
      tensor.is_cpu() == like.is_cpu() && (tensor.is_cpu() || tensor.get_device_index() == like.get_device_index());
  EP_CHECK(same, op, argument, "a tensor on the same device as the others",
           (tensor.is_cpu() ? "one on the cpu" : "one on another device"));
}

void check_winners(const char* op, const Tensor& winners, const Ints& drive_shape, int64_t batch, const Tensor& like) {
  const Ints expected = with_batch(drive_shape, winners.dim() > 0 ? winners.size(0) : 0);
  EP_CHECK(sizes(winners) == expected, op, "winners", "shape " << list(drive_shape) << " (or a batch that divides its)",
           list(winners.sizes()));
  EP_CHECK(winners.scalar_type() == ScalarType::Byte, op, "winners", "dtype uint8",
           torch::headeronly::toString(winners.scalar_type()));
  check_device(op, "winners", winners, like);
  const bool divides = expected[0] == 0 ? batch == 0 : batch % expected[0] == 0;
  EP_CHECK(divides, op, "winners", "a batch that divides " << batch, expected[0]);
}

void check_dynamics(const char* op, double damping, double slope, double lo, double hi, int64_t form, int64_t phases,
                    int64_t batch) {
  EP_CHECK(std::isfinite(damping) && damping > 0 && damping < 2 && (damping <= 1 || form == 0), op, "damping",
           "a number in (0, 1], or up to 2 in states form", damping);
  EP_CHECK(std::isfinite(slope) && slope > 0, op, "slope", "a finite number > 0", slope);
  EP_CHECK(std::isfinite(lo) && std::isfinite(hi) && lo < hi, op, "lo, hi", "finite, lo < hi", lo << ", " << hi);
  EP_CHECK(form >= 0 && form <= 2, op, "form", "0 (states), 1 (delta) or 2 (tangent)", form);
  EP_CHECK(phases == 1 || phases == 2, op, "phases", "1 or 2", phases);
  EP_CHECK(batch % phases == 0, op, "phases", "a divisor of the batch " << batch, phases);
}

void check_operands(const char* op, int64_t operands) {
  EP_CHECK(operands >= 0 && operands <= 3, op, "operands", "0 (own dtype), 1 (tf32), 2 (float16) or 3 (bfloat16)",
           operands);
}

void check_finite(const char* op, const char* argument, const Floats& values) {
  for (double v : values) EP_CHECK(std::isfinite(v), op, argument, "finite numbers", v);
}

}  // namespace ep
