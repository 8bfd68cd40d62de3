#include "contrast_launch.cuh"

namespace ep::cuda {

template void split_contrast<Products::kHalf>(Contrast&, const Device&);
template void launch_contrast<Products::kHalf>(const Contrast&, cudaStream_t);

}  // namespace ep::cuda
