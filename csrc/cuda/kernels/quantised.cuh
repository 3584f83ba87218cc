// Layout of quantised matrices on the GPU, and the exact conversion of their integers to H (float16 or
// bfloat16, the compute type).
//
// Layout. Tiles of 16 rows (the last one is padded with zeros), in units of 128 columns, 16 x 128 values, in
// the order [tile][unit]; on Hopper [unit][tile], so that one copy loads adjacent tiles of a unit:
//
//                 unit 0      unit 1
//   16 rows    | 4 quarters | 4 quarters |       quarter: 32 values, half: 64
//   (a tile)   | of 32      |            |
//
// Lane 4 g + t of a warp (g 0 to 7, t 0 to 3) loads its values of rows g and g + 8 of a tile with one 16-byte
// load, as runs of 8 values of a row. A run contains the lane's operands of two matrix instructions, of 16
// values of k each (run_value).
//
//   INT8   [tile][unit][quarter][lane] 16 bytes: the run of row g, then that of row g + 8.
//          Bytes of a run: values 0 2 1 3 4 6 5 7. Scales float32 [out].
//   INT4   [tile][unit][half][lane] 4 words: the runs of both quarters of row g, then those of row g + 8.
//          Nibbles of a run, from the lowest: values 0 2 4 6 1 3 5 7, with an offset of 8.
//          Scales bfloat16 [tile][unit][g][group of the unit][row g, row g + 8].
//   UINT4  As INT4, without the offset (value = scale (integer - zero point)).
//   UINT8  As INT8, with 128 subtracted from the values.
//   UINT4, UINT8: a span is 128 values of UINT4, 64 of UINT8. For each [tile][span][g][group of the span] two
//          words: scales float16 [row g, row g + 8], zero points [row g, row g + 8] as H, increased by the
//          offset of an integer's bits as H, so that one subtraction removes both.
//
// Cost of the conversion: 1 to 2 instructions for two values (an and-or and an addition in H), 3 for UINT8 in
// bfloat16.
//
// Reference: `packed` in tests/cuda/test_prompt_linear.py builds the layout with PyTorch; test_decode.py
// compares products with float64.
#pragma once

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/stored.cuh"

namespace qvl::cuda {

constexpr int kTileRows = 16, kUnit = 128, kRun = 8;

// Number of values of a row whose scales and zero points are contiguous.
template <int bits>
constexpr int kSpan = bits == 8 ? 64 : 128;

// Index, within its quarter, of value v of run t. With mma.m16n8k16, lanes load x themselves, in the order of
// the weights: a run is 8 adjacent values. wgmma reads x from shared memory, so a run has the order of wgmma
// fragments: pairs, 8 values apart.
__device__ inline int run_value(int t, int v) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  return v / 2 * 8 + 2 * t + v % 2;
#else
  return kRun * t + v;
#endif
}

// Indexing of a matrix in tiles and units.
struct Cut {
  int units, tiles;

  __device__ Cut(int stride, int out) : units(stride / kUnit), tiles((out + kTileRows - 1) / kTileRows) {}

  __device__ int64 unit_of(int row, int k) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    return static_cast<int64>(k / kUnit) * tiles + row / kTileRows;
#else
    return static_cast<int64>(row / kTileRows) * units + k / kUnit;
#endif
  }
  // Index of the first word of the run of lane t = k % 32 / 8; k: a multiple of 8.
  __device__ int64 int8_word(int row, int k) const {
    const int64 quarter = unit_of(row, k) * 4 + k % kUnit / 32;
    return (quarter * 32 + 4 * (row % 8) + k % 32 / 8) * 4 + row % 16 / 8 * 2;
  }
  __device__ int64 int4_word(int row, int k) const {
    const int64 half = unit_of(row, k) * 2 + k % kUnit / 64;
    return (half * 32 + 4 * (row % 8) + k % 32 / 8) * 4 + row % 16 / 8 * 2 + k % 64 / 32;
  }
  // Index of the scale of a group of `group` values.
  __device__ int64 int4_scale(int row, int k, int group) const {
    return ((unit_of(row, k) * 8 + row % 8) * (kUnit / group) + k % kUnit / group) * 2 + row % 16 / 8;
  }
  // Index of the scale of a group with a zero point, in 16-bit values; the zero point is 2 after it.
  template <int bits>
  __device__ int64 group_scale(int row, int k, int group) const {
    constexpr int kValues = kSpan<bits>;
    const int64 span = unit_of(row, k) * (kUnit / kValues) + k % kUnit / kValues;
    return ((span * 8 + row % 8) * (kValues / group) + k % kValues / group) * 4 + row % 16 / 8;
  }
};

__device__ inline H2 half2_bits(uint32 bits) {
  return reinterpret_cast<const H2&>(bits);
}
__device__ inline uint32 bits_of(H2 value) {
  return reinterpret_cast<const uint32&>(value);
}

// (word & mask) | bits and (word & mask) ^ bits as one lop3 each; the compiler would emit two, as only one
// operand may be an immediate. Plain operators on the host, for the test that runs the kernels there.
template <uint32 mask, uint32 bits>
__device__ inline uint32 and_or(uint32 word) {
#ifdef __CUDA_ARCH__
  uint32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "n"(mask), "n"(bits));
  return result;
#else
  return (word & mask) | bits;
#endif
}
template <uint32 mask, uint32 bits>
__device__ inline uint32 and_xor(uint32 word) {
#ifdef __CUDA_ARCH__
  uint32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(word), "n"(mask), "n"(bits));
  return result;
#else
  return (word & mask) ^ bits;
#endif
}

#ifdef QVL_COMPUTE_BFLOAT16
// A bfloat16 in [128, 256) with the mantissa bits m is 128 + m: or-ing m to the bits of 128 (0x4300) adds m.
__device__ inline uint32 nibbles_to_half2(uint32 word) {  // of bits 0-3 and 16-19
  return bits_of(__hsub2(half2_bits(and_or<0x000F000F, 0x43004300>(word)), half2_bits(0x43084308u)));
}
__device__ inline uint32 bytes_to_half2(uint32 word) {  // of bits 0-7 and 16-23, two's complement
  // (128 + the low 7 bits) - 128, or - 256 if the sign bit is set.
  return bits_of(__hadd2(half2_bits(and_or<0x007F007F, 0x43004300>(word)),
                         half2_bits(and_or<0x00800080, 0xC300C300>(word))));
}
constexpr float kZeroBase4 = 128, kZeroBase8 = -128;
__device__ inline uint32 nibbles_to_half2(uint32 word, uint32 zeros) {
  return bits_of(__hsub2(half2_bits(and_or<0x000F000F, 0x43004300>(word)), half2_bits(zeros)));
}
__device__ inline uint32 bytes_to_half2(uint32 word, uint32 zeros) {
  return bits_of(__hsub2(half2_bits(bytes_to_half2(word)), half2_bits(zeros)));
}
#else
// A float16 in [1024, 2048) with the mantissa bits m is 1024 + m: or-ing m to 1024's bits (0x6400)
// adds m.
__device__ inline uint32 nibbles_to_half2(uint32 word) {
  return bits_of(__hsub2(half2_bits(and_or<0x000F000F, 0x64006400>(word)), half2_bits(0x64086408u)));
}
__device__ inline uint32 bytes_to_half2(uint32 word) {
  // Flipping the sign bit adds 128: 1024 + (value + 128) - 1152, whose bits are 0x6480.
  return bits_of(__hsub2(half2_bits(and_xor<0x00FF00FF, 0x64806480>(word)), half2_bits(0x64806480u)));
}
constexpr float kZeroBase4 = 1024, kZeroBase8 = 1024;
__device__ inline uint32 nibbles_to_half2(uint32 word, uint32 zeros) {
  return bits_of(__hsub2(half2_bits(and_or<0x000F000F, 0x64006400>(word)), half2_bits(zeros)));
}
__device__ inline uint32 bytes_to_half2(uint32 word, uint32 zeros) {
  return bits_of(__hsub2(half2_bits(and_xor<0x00FF00FF, 0x64806480>(word)), half2_bits(zeros)));
}
#endif

// Repeat the low or high half of a word: the zero point of row g or g + 8 for both values of a pair.
__device__ inline uint32 low_twice(uint32 word) {
  return (word & 0xFFFFu) | word << 16;
}
__device__ inline uint32 high_twice(uint32 word) {
  return (word & 0xFFFF0000u) | word >> 16;
}
// The two scales in a word, float16.
__device__ inline float low_float16(uint32 word) {
  return value_of(Float16Value{static_cast<uint16>(word)});
}
__device__ inline float high_float16(uint32 word) {
  return value_of(Float16Value{static_cast<uint16>(word >> 16)});
}

// The two scales in a word, bfloat16.
__device__ inline float low_scale(uint32 word) {
  return __uint_as_float(word << 16);
}
__device__ inline float high_scale(uint32 word) {
  return __uint_as_float(word & 0xFFFF0000u);
}

}  // namespace qvl::cuda
