#include "contrast_launch.cuh"

namespace ep::cuda {

template void split_contrast<Products::kTf32>(Contrast&, const Device&);
template void launch_contrast<Products::kTf32>(const Contrast&, cudaStream_t);

}  // namespace ep::cuda
