// Launches of kernels/linear_decode_hopper.cu and linear_decode_hopper_groups.cu.
#pragma once

#include "cuda/ops.h"

namespace qvl::cuda {

// linear_decode of ops.h for Hopper (compute capability 9.0), the only GPU for which has_tensor_maps() of
// tensor_map.h is true. Other GPUs use the kernels that linear_decode.cc launches.
void linear_decode_hopper(const Gpu&, CUstream, const Matrix&, const void* x, int64_t x_stride, int n,
                          Epilogue, void* y, bool low_rank_next);

}  // namespace qvl::cuda
