// What the ops take, and how they multiply.
#include "ops.h"

namespace ep::cuda {

const Rules kRules{[](ScalarType dtype) {
                     return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
                   },
                   "float32, float16 or bfloat16", 1, "0 (states in their own dtype)"};

const Rules kRelaxRules{[](ScalarType dtype) { return dtype == ScalarType::Float; },
                        "float32 (states may be stored in float16: see storage)", 2,
                        "0 (states in float32) or 1 (in float16)"};

Products products_of(Type own, int64_t operands) {
  switch (operands) {
    case 1:
      return Products::kTf32;
    case 2:
      return Products::kHalf;
    case 3:
      return Products::kBFloat;
    default:
      return own == Type::kHalf ? Products::kHalf : own == Type::kBFloat ? Products::kBFloat : Products::kFloat;
  }
}

}  // namespace ep::cuda
