// Conversion of the types of weights and of the KV cache to float32, the same for both compute types:
// bfloat16 as the upper half of a float32, float16 and int8 by one conversion instruction.
//
// Reference: tests/cuda/test_decode.py and test_elementwise.py, with every type of cache.
#pragma once

#include <cuda_fp16.h>

#include "cuda/kernels/common.cuh"

namespace qvl::cuda {

// The bits of a bfloat16 and of a float16 in memory.
struct BFloat16Value {
  uint16 bits;
};
struct Float16Value {
  uint16 bits;
};

__device__ inline float value_of(float value) {
  return value;
}
__device__ inline float value_of(int8 value) {
  return static_cast<float>(value);
}
__device__ inline float value_of(BFloat16Value value) {
  return __uint_as_float(static_cast<uint32>(value.bits) << 16);
}
__device__ inline float value_of(Float16Value value) {
  return __half2float(__ushort_as_half(value.bits));
}

}  // namespace qvl::cuda
