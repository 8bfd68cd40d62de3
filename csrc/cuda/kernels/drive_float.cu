#include "drive_launch.cuh"

namespace ep::cuda {

template void launch_drive<Products::kFloat>(const Drive&, const Device&, cudaStream_t);

}  // namespace ep::cuda
