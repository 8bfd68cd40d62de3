// The CUDA kernels as torch ops: behind the schemas of csrc/ops.cpp, or (tests/host) as ops of CPU tensors.
#include <torch/csrc/stable/library.h>

#include "../schemas.h"
#include "ops.h"

#ifdef EP_HOST_RUN

STABLE_TORCH_LIBRARY(ep_kernels_host, m) { ep::define_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(ep_kernels_host, CPU, m) {
#else

STABLE_TORCH_LIBRARY_IMPL(ep_kernels, CUDA, m) {

#endif
  m.impl("drive", TORCH_BOX(&ep::cuda::drive));
  m.impl("relax_step", TORCH_BOX(&ep::cuda::relax_step));
  m.impl("contrast", TORCH_BOX(&ep::cuda::contrast));
  m.impl("relax", TORCH_BOX(&ep::cuda::relax));
}
