// Values as they are stored, whatever is computed in, to float32.
#pragma once

#include "cuda/kernels/common.cuh"

namespace qvl::cuda {

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
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

}  // namespace qvl::cuda
