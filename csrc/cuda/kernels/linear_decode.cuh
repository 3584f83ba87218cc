// Code shared by linear_decode.cu (up to 8 rows of x per block) and linear_decode_wide.cu (32 or 64; from
// sm_80 on, weights without zero points), the kernels of decode products for all GPUs but Hopper. Their
// results are bit-identical: k is divided into the same slices, a slice is summed by the same instructions in
// the same order, and the sums of the slices are added in the same order.
//
//   units of 128 values of k   | 0 | 1 | 2 | .. | units - 1 |
//   slice s of 16                [ units * s / 16, units * (s + 1) / 16 )
//
// Reference: tests/cuda/test_decode.py, through the two kernels.
#pragma once

#include "cuda/kernels/linear_decode.h"
#include "cuda/kernels/quantized.cuh"
#include "cuda/kernels/streams.cuh"

namespace qvl::cuda {

constexpr int kSlices = 16;  // slices of k, of whole units of 128

__device__ inline int slice_begin(int units, int slice) {
  return units * slice / kSlices;
}

// Products of 4-bit values use raw values: the bits of a nibble as the lowest mantissa bits of H, which is a
// bfloat16 in [128, 256) or a denormal float16. A raw value is kNibbleUnit * nibble, plus 128 in bfloat16. To
// remove the 128 and the offset 8 of int4 nibbles, the sum of a group starts at -kNibbleOffset times the sum
// of the group's values of x; with a zero point, at -raw_zero_point() times this sum. The final sum is
// divided by kNibbleUnit.
#ifdef QVL_COMPUTE_BFLOAT16
constexpr float kNibbleUnit = 1, kNibbleOffset = 128 + 8;
__device__ inline uint32 raw_nibbles(uint32 word) {
  return and_or<0x000F000F, 0x43004300>(word);
}
// Raw value of a zero point, from its stored value, which includes kZeroBase4.
__device__ inline float raw_zero_point(float stored) {
  return stored;
}
#else
constexpr float kNibbleUnit = 1.f / (1 << 24), kNibbleOffset = 8 * kNibbleUnit;
__device__ inline uint32 raw_nibbles(uint32 word) {
  return word & 0x000F000Fu;
}
__device__ inline float raw_zero_point(float stored) {
  return (stored - kZeroBase4) * kNibbleUnit;
}
#endif

// Sum of a run of x, 8 adjacent values.
__device__ inline float sum_of_run(const uint4& run) {
  const H2* pairs = reinterpret_cast<const H2*>(&run);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += to_float2(pairs[i]).x + to_float2(pairs[i]).y;
  return sum;
}

// Epilogues, as enum class Epilogue of ops.h.
constexpr int kHalf = 0, kFloat = 1, kAdd = 2, kGelu = 3, kSiluTimes = 4;

// Apply the epilogue to `value`, the product of row `row` of the matrix and row `column` of x plus the bias,
// and write the result to y. kSiluTimes: `value` and `gate` are those of rows `row` and row + 1; else `gate`
// is unused.
__device__ inline void write_result(const LinearDecode& p, int row, int64 column, float value, float gate) {
  const int64 to = column * p.out + row;
  switch (p.epilogue) {
    case kHalf:
      static_cast<H*>(p.y)[to] = to_half(value);
      break;
    case kFloat:
      static_cast<float*>(p.y)[to] = value;
      break;
    case kAdd:
      static_cast<float*>(p.y)[to] = __ldcg(static_cast<const float*>(p.y) + to) + value;
      break;
    case kGelu:
      static_cast<H*>(p.y)[to] = to_half(0.5f * value * (1 + erff(value * 0.70710678f)));
      break;
    default:
      // Keep equal to silu_times() in linear_prompt.cuh, which low_rank.cu applies instead if a request of
      // the batch has an adapter.
      static_cast<H*>(p.y)[to / 2] = to_half(value * gate / (1 + __expf(-gate)));
  }
}

}  // namespace qvl::cuda
