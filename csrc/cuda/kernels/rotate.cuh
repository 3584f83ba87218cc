// Rotation of queries and keys by the angles of a position, and conversion to the types of the cache. Shared
// by the kernels of elementwise.cu and attention_decode.cu, whose results are therefore bit-identical.
//
//   head  [ lower half | upper half ]      lower' = lower * cos - upper * sin
//                                          upper' = upper * cos + lower * sin
//   int8  value = scale * integer, scale = largest magnitude of the head / 127
//
// Cost: a multiplication and a multiply-add per value.
//
// Reference: float64 in PyTorch, tests/cuda/test_elementwise.py::test_rotate_and_store.
#pragma once

#include "cuda/kernels/stored.cuh"

namespace qvl::cuda {

// Rotate a value of the lower half of a head, with `other` from the upper half and the negated sine, or a
// value of the upper half, with `other` from the lower half and the sine.
__device__ inline float rotated(float value, float other, float cosine, float sine) {
  return __fmaf_rn(value, cosine, __fmul_rn(other, sine));
}

// Round to bfloat16. NaN stays NaN: bit 6 is set, so that the mantissa is not zero.
__device__ inline BFloat16Value bfloat16_of(float value) {
  const uint32 bits = __float_as_uint(value);
  if (value != value) return {static_cast<uint16>(bits >> 16 | 64)};
  return {static_cast<uint16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

// Round to float16. A value out of range becomes the nearest finite one; NaN stays NaN.
__device__ inline Float16Value float16_of(float value) {
  Float16Value stored;
  const float saturated = value != value ? value : fminf(fmaxf(value, -65504.f), 65504.f);
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored.bits) : "f"(saturated));
  return stored;
}

// Quantization of a head to 8 bits from its largest magnitude: value = scale * integer.
struct Int8Head {
  float scale, inverse;

  __device__ explicit Int8Head(float maximum) {
    // Treat the values of a head as zeros if the largest magnitude is infinite, or at most 1e-35: below
    // 3.7e-37, 127 / maximum would overflow.
    const bool usable = maximum > 1e-35f && maximum < __int_as_float(0x7F800000);
    inverse = usable ? 127.f / maximum : 0.f;
    scale = usable ? maximum / 127.f : 0.f;
  }
  __device__ int8 quantize(float value) const { return static_cast<int8>(__float2int_rn(value * inverse)); }
};

}  // namespace qvl::cuda
