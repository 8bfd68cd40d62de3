#include "contrast_launch.cuh"

namespace ep::cuda {

template void split_contrast<Products::kFloat>(Contrast&, const Device&);
template void launch_contrast<Products::kFloat>(const Contrast&, cudaStream_t);

}  // namespace ep::cuda
