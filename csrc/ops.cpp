// torch.ops.ep_kernels.*: their schemas, and the CPU kernels behind them (those for CUDA: csrc/cuda/register.cpp).
// LibTorch stable ABI only.
#include "cpu/ops.h"

#include "cpu/passes.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(ep_kernels, m) {
  ep::define_ops(m);
  // Index into (baseline, avx2, avx512): the instruction set that the passes use on this processor.
  m.def("cpu_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ep_kernels, CPU, m) {
  m.impl("drive", TORCH_BOX(&ep::cpu::drive));
  m.impl("relax_step", TORCH_BOX(&ep::cpu::relax_step));
  m.impl("contrast", TORCH_BOX(&ep::cpu::contrast));
  m.impl("relax", TORCH_BOX(&ep::cpu::relax));
}

namespace {

int64_t cpu_isa() {
  const char* name = ep::cpu::passes_isa();
  return name[3] == '5' ? 2 : name[3] == '2' ? 1 : 0;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ep_kernels, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
