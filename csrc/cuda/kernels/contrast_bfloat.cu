#include "contrast_launch.cuh"

namespace ep::cuda {

template void split_contrast<Products::kBFloat>(Contrast&, const Device&);
template void launch_contrast<Products::kBFloat>(const Contrast&, cudaStream_t);

}  // namespace ep::cuda
