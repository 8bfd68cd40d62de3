// The GEMM-shaped launches: to the instantiation of their products (one file each).
#include "contrast_launch.cuh"
#include "drive_launch.cuh"
#include "step_launch.cuh"

namespace ep::cuda {
namespace {

// Calls f(std::integral_constant<Products, P>{}).
template <typename F>
void with_products(Products products, const F& f) {
  switch (products) {
    case Products::kFloat:
      return f(std::integral_constant<Products, Products::kFloat>{});
    case Products::kTf32:
      return f(std::integral_constant<Products, Products::kTf32>{});
    case Products::kHalf:
      return f(std::integral_constant<Products, Products::kHalf>{});
    case Products::kBFloat:
      return f(std::integral_constant<Products, Products::kBFloat>{});
  }
}

}  // namespace

#define EP_EXTERN(P)                                                               \
  extern template void launch_step<P>(const Step&, const Device&, cudaStream_t);   \
  extern template void launch_drive<P>(const Drive&, const Device&, cudaStream_t); \
  extern template void launch_contrast<P>(const Contrast&, cudaStream_t);          \
  extern template void split_contrast<P>(Contrast&, const Device&);
EP_EXTERN(Products::kFloat)
EP_EXTERN(Products::kTf32)
EP_EXTERN(Products::kHalf)
EP_EXTERN(Products::kBFloat)
#undef EP_EXTERN

void launch(const Step& step, Products products, const Device& device, cudaStream_t stream) {
  with_products(products, [&](auto p) { launch_step<p()>(step, device, stream); });
}

void launch(const Drive& drive, Products products, const Device& device, cudaStream_t stream) {
  with_products(products, [&](auto p) { launch_drive<p()>(drive, device, stream); });
}

void launch(const Contrast& contrast, Products products, cudaStream_t stream) {
  with_products(products, [&](auto p) { launch_contrast<p()>(contrast, stream); });
}

int64_t split(Contrast& contrast, Products products, const Device& device) {
  with_products(products, [&](auto p) { split_contrast<p()>(contrast, device); });
  return static_cast<int64_t>(contrast.splits) * contrast.rows * contrast.kernel_h * contrast.kernel_w *
         contrast.columns;
}

}  // namespace ep::cuda
