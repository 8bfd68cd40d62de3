#include "step_launch.cuh"

namespace ep::cuda {

template void launch_step<Products::kBFloat>(const Step&, const Device&, cudaStream_t);

}  // namespace ep::cuda
