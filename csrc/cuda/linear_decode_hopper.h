// Products of decode steps on Hopper: kernels/linear_decode_hopper.cu.
#pragma once

#include "cuda/ops.h"

namespace qvl::cuda {

// linear_decode of ops.h, on GPUs that have tensor maps.
void linear_decode_hopper(const Gpu&, CUstream, const Matrix&, const void* x, int64_t x_stride, int n, Into,
                          void* y);

}  // namespace qvl::cuda
