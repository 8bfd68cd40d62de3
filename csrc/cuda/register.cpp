// The CUDA kernels as torch ops: behind the schemas of csrc/schemas.h, or (tests/host) as ops of CPU tensors.
#include <torch/csrc/stable/library.h>

#include "../schemas.h"
#include "ops.h"

#ifdef EP_HOST_RUN
#define EP_LIBRARY ep_kernels_host
#define EP_KEY CPU
STABLE_TORCH_LIBRARY(ep_kernels_host, m) { ep::define_ops(m); }
#else
#define EP_LIBRARY ep_kernels
#define EP_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(EP_LIBRARY, EP_KEY, m) {
  m.impl("drive", TORCH_BOX(&ep::cuda::drive));
  m.impl("relax_step", TORCH_BOX(&ep::cuda::relax_step));
  m.impl("contrast", TORCH_BOX(&ep::cuda::contrast));
  m.impl("relax", TORCH_BOX(&ep::cuda::relax));
}

STABLE_TORCH_LIBRARY_FRAGMENT(EP_LIBRARY, m) {
  // Gives back the memory that CUDA relaxations keep: how many programs there were.
  m.def("release() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(EP_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("release", TORCH_BOX(&ep::cuda::release));
}
