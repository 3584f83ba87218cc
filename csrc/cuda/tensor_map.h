// Tensors of H for the copy engine: boxes of them come to shared memory as hopper.cuh's describe() wants
// them.
#pragma once

#include <initializer_list>

#include "cuda/gpu.h"
#include "cuda/kernels/tensor_map.h"

namespace qvl::cuda {

// Whether kernels with tensor maps run here: on Hopper.
bool has_tensor_maps(const Gpu&);

// Sizes and boxes in values, strides of all dimensions but the first in bytes, multiples of 16. What lies
// outside of the sizes reads as zeros. Not `swizzled`: as the values lie in memory.
TensorMap tensor_map(const Gpu&, const void* base, std::initializer_list<int64_t> sizes,
                     std::initializer_list<int64_t> strides, std::initializer_list<int> box,
                     bool swizzled = true);

}  // namespace qvl::cuda
