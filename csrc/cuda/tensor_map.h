// Tensor maps of H for the copy engine, with boxes in the shared memory layout of describe() in hopper.cuh.
#pragma once

#include <initializer_list>

#include "cuda/gpu.h"
#include "cuda/kernels/tensor_map.h"

namespace qvl::cuda {

// Whether kernels with tensor maps run on this GPU: on Hopper.
bool has_tensor_maps(const Gpu&);

// Sizes and boxes in values, strides of all dimensions but the first in bytes, multiples of 16. Elements
// outside of the sizes read as zeros. Not `swizzled`: in the order of memory.
TensorMap tensor_map(const Gpu&, const void* base, std::initializer_list<int64_t> sizes,
                     std::initializer_list<int64_t> strides, std::initializer_list<int> box,
                     bool swizzled = true);

}  // namespace qvl::cuda
