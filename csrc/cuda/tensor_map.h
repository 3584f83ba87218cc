// Tensor maps, with which the copy engine (TMA) reads boxes of a tensor of 16-bit values: H (the compute
// type), or pairs of bytes of a quantized matrix.
#pragma once

#include <initializer_list>

#include "cuda/gpu.h"
#include "cuda/kernels/tensor_map.h"

namespace qvl::cuda {

// Whether the engine uses tensor maps on this GPU: true on Hopper (compute capability 9.0), whatever its
// driver, and false on every other GPU. Newer GPUs have tensor maps too, but no kernel uses them there.
bool has_tensor_maps(const Gpu&);

// Encode a tensor map. Sizes and boxes are in values, the first dimension is contiguous; strides, of all
// dimensions but the first, are in bytes, multiples of 16. Elements out of range read as zeros. swizzled: a
// box in shared memory has the layout of wgmma_descriptor() in kernels/hopper.cuh; otherwise its values are
// in the order of the tensor.
TensorMap tensor_map(const Gpu&, const void* base, std::initializer_list<int64_t> sizes,
                     std::initializer_list<int64_t> strides, std::initializer_list<int> box,
                     bool swizzled = true);

}  // namespace qvl::cuda
