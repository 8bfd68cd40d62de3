// torch.ops.ep_kernels.drive
#include "../common/arguments.h"
#include "loops.h"
#include "ops.h"
#include "place.h"

namespace ep::cuda {
std::tuple<Tensor, Tensor> drive(const Tensor& source, const Tensor& weight, const Ints& stride, const Ints& padding,
                                 int64_t pool, const std::optional<Tensor>& winners) {
  const Geometry g = check_drive(kRules, source, weight, stride, padding, pool, winners);
  const Ints shape = g.drive_shape(sizes(source), sizes(weight));
  const bool max = g.pool == Pool::kMax, live = max && !winners;
  const Tensor out = empty(shape, source);
  const Tensor won = empty(live ? shape : Ints{0}, source, ScalarType::Byte);
  if (out.numel() == 0) return {out, won};

  const Place place(source);
  const Type type = type_of(source.scalar_type());
  const Extent from = extent_of(sizes(source)), to = extent_of(shape);
  const Buffer map = new_map(shape[0], from, type, source, Start::kAny);
  const Buffer matrix = new_drive_matrix(weight, from, type, source, Start::kAny);
  const Buffer pooled = new_map(shape[0], to, Type::kFloat, source, Start::kAny);
  std::vector<Copy> copies{fill_map(source, map), fill_drive_matrix(weight, from, matrix)};
  Drive d = alone(drive_loop(g, map, matrix), 1.0, pooled, nullptr);
  d.pool = g.pool;
  std::optional<Buffer> given, found;
  if (live) {
    found = new_map(shape[0], to, Type::kByte, source, Start::kAny);
    d.winners_out = found->winners();
  } else if (max) {
    given = new_map(winners->size(0), to, Type::kByte, source, Start::kAny);
    copies.push_back(fill_map(*winners, *given));
    d.winners = given->winners();
    d.winners_samples = given->size[0];
  }
  launch(copies, place.stream());
  launch(d, products_of(type), place.device(), place.stream());
  std::vector<Copy> results{take_map(pooled, out)};
  if (live) results.push_back(take_map(*found, won));
  launch(results, place.stream());
  return {out, won};
}

}  // namespace ep::cuda
