// The CPU kernels behind torch.ops.ep_kernels.*; schemas and their meaning: csrc/schemas.h.
#pragma once

#include <optional>
#include <tuple>

#include "../common/checks.h"

namespace ep::cpu {

// What this backend takes: no storage but the tensors' own.
extern const Rules kRules;

#include "../common/ops.inl"

}  // namespace ep::cpu
