// Epilogue of a product: bias, activation, type (Epilogue of ops.h); for prompts and images on any GPU, for
// decode steps only on Hopper and in low_rank.cu (elsewhere: linear_decode.cuh). A thread finishes two
// adjacent columns of a row:
//
//   sums (a, b) of columns c, c + 1 -> H [n, out] | float32 [n, out] | += float32 [n, out] | gelu: H [n, out]
//   kEpilogueSiluTimes: a and b are a value of w1 x and of w2 x; a * silu(b) -> H [n, out / 2]
//
// Cost: y once, 2 to 8 bytes per element, negligible compared with the 2 * in operations per element of the
// product.
//
// Reference: float64 in PyTorch, tests/cuda/test_prompt_linear.py::test_every_tile_at_odd_sizes, test_gelu.
#pragma once

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/linear_prompt.h"

namespace qvl::cuda {

// GELU, x times the normal CDF of x, by a polynomial: half the instructions of erff. The absolute error is at
// most 4.6e-5 (at -4.25 and 4.25, beyond which the result is 0 and x); for x from -1 on the relative error is
// at most 2.1e-5.
__device__ inline float gelu(float x) {
  const float square = fminf(x * x, 4.25f * 4.25f);
  float slope = -2.1248387e-12f;  // polynomial in x^2; CDF = 0.5 + x * slope
  slope = fmaf(slope, square, 2.34336245e-10f);
  slope = fmaf(slope, square, -1.16305197e-08f);
  slope = fmaf(slope, square, 3.46490964e-07f);
  slope = fmaf(slope, square, -6.99565362e-06f);
  slope = fmaf(slope, square, 1.02684615e-04f);
  slope = fmaf(slope, square, -1.14473666e-03f);
  slope = fmaf(slope, square, 9.88993794e-03f);
  slope = fmaf(slope, square, -6.64079785e-02f);
  slope = fmaf(slope, square, 3.98913950e-01f);
  return x * __saturatef(fmaf(slope, x, 0.5f));
}

__device__ inline float silu_times(float x, float gate) {
  return x * gate / (1 + __expf(-gate));
}

// Add to float32 in memory without waiting for the old value. There is one addition per element and launch,
// so the result does not depend on the order of blocks. Without __CUDA_ARCH__: the host, in tests
// (tests/engine/host_gpu).
__device__ inline void add_to(float* y, float value) {
#ifdef __CUDA_ARCH__
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(y), "f"(value) : "memory");
#else
  *y += value;
#endif
}

// Finish columns `column`, which is even, and column + 1 of a row; the second is skipped if it is beyond
// `out`.
__device__ inline void finish_pair(const Result& p, int row, int column, float a, float b) {
  const bool has_second = column + 1 < p.out;
  if (p.bias != nullptr) {
    a += p.bias[column];
    if (has_second) b += p.bias[column + 1];
  }
  if (p.epilogue == kEpilogueSiluTimes) {
    static_cast<H*>(p.y)[static_cast<int64>(row) * (p.out / 2) + column / 2] = to_half(silu_times(a, b));
    return;
  }
  const int64 at = static_cast<int64>(row) * p.out + column;
  if (p.epilogue == kEpilogueHalf || p.epilogue == kEpilogueGelu) {
    H* y = static_cast<H*>(p.y) + at;
    if (p.epilogue == kEpilogueGelu) a = gelu(a), b = gelu(b);
    if (p.out % 2 == 0) {
      *reinterpret_cast<H2*>(y) = to_half2(a, b);
    } else {
      y[0] = to_half(a);
      if (has_second) y[1] = to_half(b);
    }
  } else {
    float* y = static_cast<float*>(p.y) + at;
    if (p.epilogue == kEpilogueAdd) {
      add_to(y, a);
      if (has_second) add_to(y + 1, b);
    } else {
      y[0] = a;
      if (has_second) y[1] = b;
    }
  }
}

}  // namespace qvl::cuda
