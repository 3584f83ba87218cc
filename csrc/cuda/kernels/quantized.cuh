// Layout of quantized matrices on the GPU, which upload_matrix.cu writes, and the exact conversion of their
// integers to H (float16 or bfloat16, the compute type).
//
// Layout. Rows form tiles of 16 (the last tile is padded with rows of zeros), and a tile is divided into
// units of 128 columns, 16 x 128 values. Units are stored in the order [tile][unit]; on Hopper [unit][tile],
// so that one copy loads the same unit of adjacent tiles:
//
//                 unit 0      unit 1
//   16 rows    | 4 quarters | 4 quarters |       quarter: 32 values, half: 64
//   (a tile)   | of 32      |            |
//
// A run is 8 values of a row in one quarter. Lane 4 g + t of a warp (g 0 to 7, t 0 to 3) loads runs of rows g
// and g + 8 of a tile, 16 bytes at a time. A run contains the operands of this lane for two matrix
// instructions of depth 16 in k. run_value() defines the values of run t.
//
//   INT8   [tile][unit][quarter][lane] 16 bytes: the run of row g, then that of row g + 8.
//          Bytes of a run: values 0 2 1 3 4 6 5 7. Scales float32 [out].
//   INT4   [tile][unit][half][lane] 4 words of 32 bits, a run each: both quarters of row g, then those of
//          row g + 8.
//          Nibbles of a run, from the lowest: values 0 2 4 6 1 3 5 7, with an offset of 8.
//          Scales bfloat16 [tile][unit][g 0 to 7][group of the unit][row g, row g + 8].
//   UINT4  Values as INT4, without the offset (value = scale * (integer - zero point)).
//   UINT8  Values as INT8, with 128 subtracted from the integers.
//
// The scales and zero points of UINT4 and UINT8 are stored by span, which is 128 values of UINT4 or 64 of
// UINT8; those of a group of 128 in UINT8 are stored for both of its spans. For each
// [tile][span][g][group of the span] there are two words: scales float16 [row g, row g + 8], then zero points
// H [row g, row g + 8]. A conversion places the bits of an integer in an H, which then differs from the
// integer by kZeroBase4 or kZeroBase8. Stored zero points include this constant, so that one subtraction
// removes both.
//
// Cost of the conversion of two values, without shifts: 2 instructions, a logical one and a subtraction in H.
// In bfloat16, whose mantissa has only 7 bits, INT8 takes 3 and UINT8 4.
//
// Reference: `packed` in tests/cuda/test_prompt_linear.py builds the layout of INT8 and INT4 with PyTorch;
// test_decode.py compares products of all types with float64.
#pragma once

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/stored.cuh"

namespace qvl::cuda {

constexpr int kTileRows = 16, kUnit = 128, kRun = 8;

// Number of values of a row whose scales and zero points are contiguous.
template <int bits>
constexpr int kSpan = bits == 8 ? 64 : 128;

// Index of value v of run t within its quarter. For mma.m16n8k16 the lanes load x themselves, in the order of
// the weights, so a run is 8 adjacent values. wgmma reads x from shared memory in its own order, so a run
// consists of pairs that are 8 values apart, as in the fragments of wgmma.
__device__ inline int run_value(int t, int v) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  return v / 2 * 8 + 2 * t + v % 2;
#else
  return kRun * t + v;
#endif
}

// Indices into a matrix in tiles and units.
struct TiledLayout {
  int units, tiles;

  __device__ TiledLayout(int stride, int out)
      : units(stride / kUnit), tiles((out + kTileRows - 1) / kTileRows) {}

  __device__ int64 unit_index(int row, int k) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    return static_cast<int64>(k / kUnit) * tiles + row / kTileRows;
#else
    return static_cast<int64>(row / kTileRows) * units + k / kUnit;
#endif
  }
  // Index of the first 32-bit word of the run k % 32 / 8 of the quarter that contains value k of a row. k: a
  // multiple of 8.
  __device__ int64 int8_word(int row, int k) const {
    const int64 quarter = unit_index(row, k) * 4 + k % kUnit / 32;
    return (quarter * 32 + 4 * (row % 8) + k % 32 / 8) * 4 + row % 16 / 8 * 2;
  }
  __device__ int64 int4_word(int row, int k) const {
    const int64 half = unit_index(row, k) * 2 + k % kUnit / 64;
    return (half * 32 + 4 * (row % 8) + k % 32 / 8) * 4 + row % 16 / 8 * 2 + k % 64 / 32;
  }
  // Index of the scale of the group that contains value k of a row, in 16-bit values. group: the group size.
  __device__ int64 int4_scale(int row, int k, int group) const {
    return ((unit_index(row, k) * 8 + row % 8) * (kUnit / group) + k % kUnit / group) * 2 + row % 16 / 8;
  }
  // The same for types with zero points; the zero point is 2 places after the scale, in 16-bit values. group:
  // at most kSpan.
  template <int bits>
  __device__ int64 group_scale(int row, int k, int group) const {
    constexpr int kValues = kSpan<bits>;
    const int64 span = unit_index(row, k) * (kUnit / kValues) + k % kUnit / kValues;
    return ((span * 8 + row % 8) * (kValues / group) + k % kValues / group) * 4 + row % 16 / 8;
  }
};

__device__ inline H2 half2_from_bits(uint32 bits) {
  return reinterpret_cast<const H2&>(bits);
}
__device__ inline uint32 bits_of(H2 value) {
  return reinterpret_cast<const uint32&>(value);
}

// (word & mask) | bits and (word & mask) ^ bits, each as one lop3 instruction with the truth table 0xEA or
// 0x6A. The compiler would emit two instructions, since only one operand may be an immediate. On the host,
// for the test that runs the kernels there, plain operators.
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
// Conversions of two integers in a word to two values of H. nibbles_to_half2: of bits 0 to 3 and 16 to 19,
// minus 8 (INT4). bytes_to_half2: of bits 0 to 7 and 16 to 23, in two's complement (INT8). The overloads with
// `zeros`, two stored zero points, subtract these (UINT4, UINT8).
//
// A bfloat16 in [128, 256) with the mantissa bits m is 128 + m: or-ing m to the bits of 128 (0x4300) adds m.
__device__ inline uint32 nibbles_to_half2(uint32 word) {
  return bits_of(
      __hsub2(half2_from_bits(and_or<0x000F000F, 0x43004300>(word)), half2_from_bits(0x43084308u)));
}
__device__ inline uint32 bytes_to_half2(uint32 word) {
  // (128 + the low 7 bits) - 128, or - 256 if the sign bit is set.
  return bits_of(__hadd2(half2_from_bits(and_or<0x007F007F, 0x43004300>(word)),
                         half2_from_bits(and_or<0x00800080, 0xC300C300>(word))));
}
constexpr float kZeroBase4 = 128, kZeroBase8 = -128;
__device__ inline uint32 nibbles_to_half2(uint32 word, uint32 zeros) {
  return bits_of(__hsub2(half2_from_bits(and_or<0x000F000F, 0x43004300>(word)), half2_from_bits(zeros)));
}
__device__ inline uint32 bytes_to_half2(uint32 word, uint32 zeros) {
  return bits_of(__hsub2(half2_from_bits(bytes_to_half2(word)), half2_from_bits(zeros)));
}
#else
// As above. A float16 in [1024, 2048) with the mantissa bits m is 1024 + m: or-ing m to the bits of 1024
// (0x6400) adds m.
__device__ inline uint32 nibbles_to_half2(uint32 word) {
  return bits_of(
      __hsub2(half2_from_bits(and_or<0x000F000F, 0x64006400>(word)), half2_from_bits(0x64086408u)));
}
__device__ inline uint32 bytes_to_half2(uint32 word) {
  // Flipping the sign bit adds 128: 1024 + (value + 128) - 1152, whose bits are 0x6480.
  return bits_of(
      __hsub2(half2_from_bits(and_xor<0x00FF00FF, 0x64806480>(word)), half2_from_bits(0x64806480u)));
}
constexpr float kZeroBase4 = 1024, kZeroBase8 = 1024;
__device__ inline uint32 nibbles_to_half2(uint32 word, uint32 zeros) {
  return bits_of(__hsub2(half2_from_bits(and_or<0x000F000F, 0x64006400>(word)), half2_from_bits(zeros)));
}
__device__ inline uint32 bytes_to_half2(uint32 word, uint32 zeros) {
  return bits_of(__hsub2(half2_from_bits(and_xor<0x00FF00FF, 0x64806480>(word)), half2_from_bits(zeros)));
}
#endif

// The low or high half of a word in both halves: the zero point of row g, or of row g + 8, for two values.
__device__ inline uint32 repeat_low(uint32 word) {
  return (word & 0xFFFFu) | word << 16;
}
__device__ inline uint32 repeat_high(uint32 word) {
  return (word & 0xFFFF0000u) | word >> 16;
}
// Scales in a word: float16 or bfloat16, that of row g in the low half and that of row g + 8 in the high
// half.
__device__ inline float low_float16_to_float(uint32 word) {
  return value_of(Float16Value{static_cast<uint16>(word)});
}
__device__ inline float high_float16_to_float(uint32 word) {
  return value_of(Float16Value{static_cast<uint16>(word >> 16)});
}
__device__ inline float low_bfloat16_to_float(uint32 word) {
  return __uint_as_float(word << 16);
}
__device__ inline float high_bfloat16_to_float(uint32 word) {
  return __uint_as_float(word & 0xFFFF0000u);
}

}  // namespace qvl::cuda
