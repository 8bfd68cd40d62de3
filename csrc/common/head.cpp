#include "head.h"

namespace ep {

Head head_of(const char* op, const int64_t* spec, const double* scalars, const Tensor* tensors, const Ints& node,
             int64_t samples, const Tensor& like) {
  const Tensor &map = tensors[0], &bias = tensors[1], &target = tensors[2];
  EP_CHECK(spec[1] >= 0 && spec[1] <= 2, op, "head_spec", "loss 0 (cross_entropy), 1 (mse) or 2 (cosine)", spec[1]);
  EP_CHECK(spec[2] >= 0 && spec[2] < 1 << 15, op, "head_spec", "a pool from 0 to 32767", spec[2]);
  EP_CHECK(spec[3] == 0 || spec[3] == 1, op, "head_spec", "pointwise 0 or 1", spec[3]);
  EP_CHECK(scalars[1] > 0, op, "head_scalars", "a temperature > 0", scalars[1]);
  const int64_t pool = spec[2];
  const bool pointwise = spec[3] == 1;
  EP_CHECK(node.size() == 4 || (pool == 0 && !pointwise), op, "head_spec",
           "no pool and no pointwise map on a vector node", list(node));
  Ints output = with_batch(node, samples);
  if (pool > 0) output[2] = output[3] = pool;
  if (pointwise || present(map)) {
    const int64_t outputs = map.dim() > 0 ? map.size(0) : 0;
    check_like(op, "heads", map, pointwise ? Ints{outputs, node[1], 1, 1} : Ints{outputs, product(output, 1)}, like);
    EP_CHECK(outputs > 0, op, "heads", "at least one output", outputs);
    if (present(bias)) check_like(op, "heads", bias, {outputs}, like);
    output = pointwise ? Ints{samples, outputs, output[2], output[3]} : Ints{samples, outputs};
  } else {
    EP_CHECK(!present(bias), op, "heads", "no bias without a map", list(bias.sizes()));
  }
  check_like(op, "heads", target, output, like);
  return {spec[0], static_cast<Loss>(spec[1]), pool, pointwise, scalars[0], scalars[1], map, bias, target};
}

}  // namespace ep
