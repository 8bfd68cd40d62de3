// The CUDA kernels behind torch.ops.ep_kernels.*; schemas and their meaning: csrc/schemas.h.
#pragma once

#include <optional>
#include <tuple>

#include "../common/checks.h"
#include "kernels.h"

namespace ep::cuda {

// What drive, relax_step and contrast take; and what relax takes.
extern const Rules kRules, kRelaxRules;

// Of operands by their code in the schema; 0: tensors in their own type.
Products products_of(Type own, int64_t operands = 0);

#include "../common/ops.inl"

// Forgets the programs of earlier relaxations, with their buffers and graphs, after their last use; returns how many.
int64_t release();

}  // namespace ep::cuda
