// The GEMM-shaped launches: to the instantiation of their products (one file each), and what a device can do.
#include <cstdlib>
#include <cstring>

#include "../runtime.h"
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

// wgmma is in the build if 9.0a is, and is used if EP_KERNELS_WGMMA is 1: it has not been measured on a device yet.
bool warpgroups_wanted() {
#ifdef EP_HAVE_SM90A
  const char* const asked = std::getenv("EP_KERNELS_WGMMA");
  return asked && std::strcmp(asked, "1") == 0;
#else
  return false;
#endif
}

}  // namespace

#define EP_EXTERN(P)                                                                     \
  extern template void launch_step<P>(const Step&, const Device&, cudaStream_t);         \
  extern template void launch_drive<P>(const Drive&, const Device&, cudaStream_t);       \
  extern template void launch_contrast<P>(const Contrast&, const Device&, cudaStream_t); \
  extern template void split_contrast<P>(Contrast&, const Device&);
EP_EXTERN(Products::kFloat)
EP_EXTERN(Products::kTf32)
EP_EXTERN(Products::kHalf)
EP_EXTERN(Products::kBFloat)
#undef EP_EXTERN

Device device_of(int index) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    EP_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index));
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  return {index,
          major,
          attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          major == 9 && warpgroups_wanted()};
}

void launch(const Step& step, Products products, const Device& device, cudaStream_t stream) {
  with_products(products, [&](auto p) { launch_step<p()>(step, device, stream); });
}

void launch(const Drive& drive, Products products, const Device& device, cudaStream_t stream) {
  with_products(products, [&](auto p) { launch_drive<p()>(drive, device, stream); });
}

void launch(const Contrast& contrast, Products products, const Device& device, cudaStream_t stream) {
  with_products(products, [&](auto p) { launch_contrast<p()>(contrast, device, stream); });
}

int64_t split(Contrast& contrast, Products products, const Device& device) {
  with_products(products, [&](auto p) { split_contrast<p()>(contrast, device); });
  return static_cast<int64_t>(contrast.splits) * contrast.rows * contrast.kernel_h * contrast.kernel_w *
         contrast.columns;
}

}  // namespace ep::cuda
