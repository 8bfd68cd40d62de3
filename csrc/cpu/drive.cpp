// torch.ops.ep_kernels.drive
#include "../common/arguments.h"
#include "connection.h"
#include "ops.h"

namespace ep::cpu {

const Rules kRules{[](ScalarType dtype) { return dtype == ScalarType::Float || dtype == ScalarType::Double; },
                   "float32 or float64", 1, "0 (states in their own dtype: this backend stores no other)"};

std::tuple<Tensor, Tensor> drive(const Tensor& source, const Tensor& weight, const Ints& stride, const Ints& padding,
                                 int64_t pool, const std::optional<Tensor>& winners) {
  const Geometry g = check_drive(kRules, source, weight, stride, padding, pool, winners);
  std::optional<Tensor> frozen;
  if (winners && g.pool == Pool::kMax) frozen = dense(*winners);
  Tensor won = empty({0}, source, ScalarType::Byte);
  const Tensor pooled = pooled_drive(g.linear ? source : dense(source), dense(weight), g, frozen ? &*frozen : nullptr,
                                     &won, source.scalar_type());
  return {pooled, won};
}

}  // namespace ep::cpu
