// GPU 0 for the launchers that tests and benchmarks/gpu/products.py call.
#pragma once

#include "cuda/ops.h"

namespace qvl::cuda {

template <Half half>
const Gpu& gpu_of() {
  // Never freed: the driver may be unloaded before static objects are destroyed.
  static const Gpu* const gpu = new Gpu(0, half);
  return *gpu;
}

// GPU 0 with kernels of a compute type. Created on first use: a GPU before sm_80 has no bfloat16.
inline const Gpu& test_gpu(bool bfloat16) {
  return bfloat16 ? gpu_of<Half::kBfloat16>() : gpu_of<Half::kFloat16>();
}

}  // namespace qvl::cuda
