// Dequantization of matrices to H [out, stride] for products of prompts: y = scale * (integer - zero point),
// rounded to H.
//
// Layout. A thread converts a run of 8 values of a row, adjacent except on Hopper (run_value()), in the
// layouts of quantized.cuh:
//
//   8 bits   bytes of values 0 2 1 3 4 6 5 7      |
//   4 bits   nibbles of values 0 2 4 6 1 3 5 7    |   ->   H of values 0 1 2 3 4 5 6 7
//
// Cost. Bytes per value: 2 written, and 1 (8 bits) or 1/2 (4 bits) read; memory-bound. With int8 a matrix
// takes 3 * out * stride bytes of traffic: at the 7B geometry a layer's 202 million values take 0.14 ms at
// 4.3 TB/s.
//
// Reference: float64 in PyTorch, tests/cuda/test_prompt_linear.py::test_quantized_weights for the types
// without zero points, test_decode.py::test_a_prompt_product_is_that_of_float64 for all types.
#include "cuda/kernels/linear_prompt.h"
#include "cuda/kernels/quantized.cuh"

namespace qvl::cuda {

// kGroup: group size; 0 for one scale per row.
template <int kBits, int kGroup, bool kZeros>
__device__ inline void dequantize(const Dequantize& p) {
  const int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int runs = p.stride / kRun;
  const TiledLayout layout(p.stride, p.out);
  if (i >= static_cast<int64>(p.out) * runs) return;
  const int row = static_cast<int>(i / runs), k = static_cast<int>(i % runs) * kRun;
  const uint32* const words = static_cast<const uint32*>(p.values);
  const uint16* const scales = static_cast<const uint16*>(p.scales);
  float scale;
  int zero = kBits == 4 ? 8 : 0;
  if constexpr (kGroup == 0) {
    scale = static_cast<const float*>(p.scales)[row];
  } else if constexpr (kZeros) {
    const int64 at = layout.group_scale<kBits>(row, k, kGroup);
    scale = low_float16_to_float(scales[at]);
    const float base = kBits == 4 ? kZeroBase4 : kZeroBase8 + 128;  // 8-bit integers are stored minus 128
    zero = static_cast<int>(to_float(reinterpret_cast<const H&>(scales[at + 2])) - base);
  } else {
    scale = low_bfloat16_to_float(scales[layout.int4_scale(row, k, kGroup)]);
  }
  H2 pairs[4];
  if constexpr (kBits == 8) {
    const int64 at = layout.int8_word(row, k);
    // Bytes of a word: values 0 2 1 3.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int word = static_cast<int>(words[at + j / 2]) >> (j % 2 * 8);
      pairs[j] =
          to_half2(scale * (static_cast<int8>(word) - zero), scale * (static_cast<int8>(word >> 16) - zero));
    }
  } else {
    const uint32 word = words[layout.int4_word(row, k)];
    // Nibbles: values 0 2 4 6 1 3 5 7.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int low = static_cast<int>(word >> (4 * j) & 15) - zero,
                high = static_cast<int>(word >> (4 * j + 16) & 15) - zero;
      pairs[j] = to_half2(scale * low, scale * high);
    }
  }
  H* const quarter = static_cast<H*>(p.y) + static_cast<int64>(row) * p.stride + k / 32 * 32;
#pragma unroll
  for (int j = 0; j < 4; ++j) *reinterpret_cast<H2*>(quarter + run_value(k % 32 / kRun, 2 * j)) = pairs[j];
}

#define QVL_DEQUANTIZE(NAME, BITS, GROUP, ZEROS)                \
  extern "C" __global__ void __launch_bounds__(256)             \
      dequantize_##NAME(const __grid_constant__ Dequantize p) { \
    wait_for_predecessors();                                    \
    dequantize<BITS, GROUP, ZEROS>(p);                          \
  }
QVL_DEQUANTIZE(int8, 8, 0, false)
QVL_DEQUANTIZE(int4_g64, 4, 64, false)
QVL_DEQUANTIZE(int4_g128, 4, 128, false)
QVL_DEQUANTIZE(uint4_g32, 4, 32, true)
QVL_DEQUANTIZE(uint4_g64, 4, 64, true)
QVL_DEQUANTIZE(uint4_g128, 4, 128, true)
QVL_DEQUANTIZE(uint8_g32, 8, 32, true)
QVL_DEQUANTIZE(uint8_g64, 8, 64, true)

}  // namespace qvl::cuda
