// torch.ops.ep_kernels.drive
#include "connection.h"
#include "ep/check.h"
#include "ops.h"

namespace ep::cpu {

Geometry geometry_of(const char* op, const Tensor& weight, const Ints& stride, const Ints& padding, int64_t pool) {
  EP_CHECK(stride.size() == 2, op, "stride", "2 integers", stride.size());
  EP_CHECK(padding.size() == 2, op, "padding", "2 integers", padding.size());
  EP_CHECK(pool >= 0 && pool <= 2, op, "pool", "0 (none), 1 (max) or 2 (avg)", pool);
  return {weight.dim() == 2, stride, padding, static_cast<Pool>(pool)};
}

std::tuple<Tensor, Tensor> drive(const Tensor& source, const Tensor& weight, const Ints& stride, const Ints& padding,
                                 int64_t pool, const std::optional<Tensor>& winners) {
  const Geometry g = geometry_of("drive", weight, stride, padding, pool);
  check_connection("drive", sizes(source), weight, g, source);
  std::optional<Tensor> frozen;
  if (winners && g.pool == Pool::kMax) {
    check_winners("drive", *winners, g.drive_shape(sizes(source), sizes(weight)), source.size(0));
    frozen = dense(*winners);
  }
  Tensor won = empty({0}, source, ScalarType::Byte);
  const Tensor pooled = pooled_drive(g.linear ? source : dense(source), dense(weight), g, frozen ? &*frozen : nullptr,
                                     &won, source.scalar_type());
  return {pooled, won};
}

}  // namespace ep::cpu
