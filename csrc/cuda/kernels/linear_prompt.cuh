// What becomes of the sums of a product: bias, activation, type.
#pragma once

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/linear_prompt.h"

namespace qvl::cuda {

__device__ inline float gelu(float x) {
  return 0.5f * x * (1 + erff(x * 0.70710678f));
}

__device__ inline float silu_times(float x, float gate) {
  return x * gate / (1 + __expf(-gate));
}

// Adds to float32 in memory without waiting for the old value. One addition an element and launch, so what
// comes out does not depend on the order of blocks.
__device__ inline void add_to(float* y, float value) {
#ifdef __CUDA_ARCH__
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(y), "f"(value) : "memory");
#else
  *y += value;
#endif
}

// Finish columns `column` (even) and column + 1 of a row; one beyond `out` is left out.
__device__ inline void finish_pair(const Result& p, int row, int column, float a, float b) {
  const bool both = column + 1 < p.out;
  if (p.bias != nullptr) {
    a += p.bias[column];
    if (both) b += p.bias[column + 1];
  }
  if (p.into == kIntoSiluTimes) {
    static_cast<H*>(p.y)[static_cast<int64>(row) * (p.out / 2) + column / 2] = to_half(silu_times(a, b));
    return;
  }
  const int64 at = static_cast<int64>(row) * p.out + column;
  if (p.into == kIntoHalf || p.into == kIntoGelu) {
    H* y = static_cast<H*>(p.y) + at;
    if (p.into == kIntoGelu) a = gelu(a), b = gelu(b);
    if (p.out % 2 == 0) {
      *reinterpret_cast<H2*>(y) = to_half2(a, b);
    } else {
      y[0] = to_half(a);
      if (both) y[1] = to_half(b);
    }
  } else {
    float* y = static_cast<float*>(p.y) + at;
    if (p.into == kIntoAdd) {
      add_to(y, a);
      if (both) add_to(y + 1, b);
    } else {
      y[0] = a;
      if (both) y[1] = b;
    }
  }
}

}  // namespace qvl::cuda
