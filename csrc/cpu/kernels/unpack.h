// Unpacking of weight tiles for the blocked product (gemm.h): to bfloat16 in kernels with bf16_dot (table.h),
// float32 weights excepted; otherwise to float32.
//
// Layout:
//
//   matrix                first_k
//             +-------------+-------+------+
//   first_row |             | n_k   |      |         tile [n_rows][n_k rounded up to 2], float32 or bfloat16
//             |             | wide  |      |  ---->  an added column has no effect
//             +-------------+-------+------+
//
// The added column of a float32 tile is not read; that of a bfloat16 tile multiplies a zero of x.
//
// kChunk = 32 columns of a row are unpacked at a time: 2 vectors of 16 lanes, 4 of 8 or 8 of 4. 4-bit weights
// are converted to bfloat16 by table look-up: the table contains (nibble - zero) * scale for the 16 nibbles,
// where zero is 8 for int4, and one permutation instruction looks up 32 values.
//
// Cost: the bytes of the matrix once, and n_rows * n_k values written to and read from the L2 cache. A value
// is unpacked once for up to 384 tokens (kMaxTokens of linear.cc). int8 values are not multiplied by the
// scale of their row, which write_block applies to the sums.
//
// Reference: reference::linear over qvl_unpack's values, tests/csrc/test_kernels.py::test_linear.
#pragma once

#include "cpu/kernels/quantized_x.h"

namespace {

using qvl::cpu::UnpackTile;

// Columns of a row unpacked at a time. If the tile's width is not a multiple of kChunk, the last chunk of a
// row is stored beyond the row's end. The tile's memory has space for this, since it is allocated for the
// maximum width, a multiple of kChunk.
constexpr int kChunk = 32;
constexpr int kChunkVectors = kChunk / kLanes;

// An Unpack class of each storage type has chunk(): columns first_k + i to first_k + i + kChunk - 1 of a row
// as float32. Columns beyond the row are zeros, or with zero points -zero * scale.

template <typename Value>
struct UnpackFloats {
  static QVL_INLINE void chunk(const UnpackTile& t, int64_t row, int i, Floats (&v)[kChunkVectors]) {
    const Value* from = static_cast<const Value*>(t.weights) + row * t.k + t.first_k + i;
    const int n = t.n_k - i;
#pragma GCC unroll 8
    for (int j = 0; j < kChunkVectors; ++j) {
      const int remaining = n - j * kLanes;
      v[j] = remaining >= kLanes ? load_floats(from + j * kLanes)
             : remaining > 0     ? load_first(from + j * kLanes, remaining)
                                 : Floats{};
    }
  }
};

// Quantized rows are padded to a multiple of 128 columns, int8 with zeros; first_k is a multiple of 128.
struct UnpackInt8 {
  static QVL_INLINE void chunk(const UnpackTile& t, int64_t row, int i, Floats (&v)[kChunkVectors]) {
    const int8_t* from = static_cast<const int8_t*>(t.weights) + row * round_up(t.k, kUnit) + t.first_k + i;
#pragma GCC unroll 8
    for (int j = 0; j < kChunkVectors; ++j) {
      v[j] = to_floats(widen_bytes(load<LaneBytes>(from + j * kLanes)));
    }
  }
};

// Location of a chunk of int4 values: nibble `nibble` of 32 words.
template <int Group>
struct Int4Chunk {
  const uint8_t* words;
  int nibble;
  float scale;

  QVL_INLINE Int4Chunk(const UnpackTile& t, int64_t row, int i) {
    const int64_t index = row * round_up(t.k, kUnit) + t.first_k + i;
    words = static_cast<const uint8_t*>(t.weights) + index / kUnit * (kUnit / 2);
    nibble = static_cast<int>(index % kUnit) / kChunk;
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(t.scales)[index / Group]) << 16;
    __builtin_memcpy(&scale, &bits, sizeof scale);
  }
};

template <int Group>
struct UnpackInt4 {
  static QVL_INLINE void chunk(const UnpackTile& t, int64_t row, int i, Floats (&v)[kChunkVectors]) {
    const Int4Chunk<Group> from(t, row, i);
#pragma GCC unroll 8
    for (int j = 0; j < kChunkVectors; ++j) {
      const HalfWords words = load<HalfWords>(from.words + 2 * j * kLanes);
      const Ints integers = reinterpret_cast<Ints>(widen_halves(words >> (4 * from.nibble) & 15)) - 8;
      v[j] = to_floats(integers) * from.scale;
    }
  }
};

// Element i of a float16 array.
QVL_INLINE float float16_at(const void* values, int64_t i) {
  return widen_float16(load_first_halves(static_cast<const uint16_t*>(values) + i, 1))[0];
}

// Types with zero points: all values of a chunk belong to one group. value = (integer - zero) * scale, exact
// in float32, because zero points are integers up to 256.
template <int Bits, int Group>
struct UnpackGroups {
  static QVL_INLINE void chunk(const UnpackTile& t, int64_t row, int i, Floats (&v)[kChunkVectors]) {
    const int64_t index = row * round_up(t.k, kUnit) + t.first_k + i;
    const float scale = float16_at(t.scales, index / Group), zero = float16_at(t.zeros, index / Group);
    const auto* weights = static_cast<const uint8_t*>(t.weights);
#pragma GCC unroll 8
    for (int j = 0; j < kChunkVectors; ++j) {
      if constexpr (Bits == 8) {
        // Flipping the highest bit subtracts 128, which makes the bytes signed.
        const LaneBytes bytes = load<LaneBytes>(weights + index + j * kLanes) ^ int8_t { -128 };
        v[j] = (to_floats(widen_bytes(bytes)) - (zero - 128)) * scale;
      } else {
        const HalfWords words = load<HalfWords>(weights + index / kUnit * (kUnit / 2) + 2 * j * kLanes);
        const HalfWords nibbles = words >> (4 * (index % kUnit / kChunk)) & 15;
        v[j] = (to_floats(reinterpret_cast<Ints>(widen_halves(nibbles))) - zero) * scale;
      }
    }
  }
};

template <typename Unpack>
void unpack_to_f32(const UnpackTile& t) {
  const int width = round_up(t.n_k, 2);
  for (int64_t r = 0; r < t.n_rows; ++r) {
    float* to = static_cast<float*>(t.tile) + r * width;
    for (int i = 0; i < width; i += kChunk) {
      Floats v[kChunkVectors];
      Unpack::chunk(t, t.first_row + r, i, v);
#pragma GCC unroll 8
      for (int j = 0; j < kChunkVectors; ++j) store(to + i + j * kLanes, v[j]);
    }
  }
}

#if defined(__AVX512BF16__)
// narrow_chunk(): a chunk as 32 bfloat16 values. In general, convert the result of chunk().
template <typename Unpack>
QVL_INLINE __m512i narrow_chunk(Unpack, const UnpackTile& t, int64_t row, int i) {
  Floats v[2];
  Unpack::chunk(t, row, i, v);
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(v[1]), reinterpret_cast<__m512>(v[0])));
}

// Convert nibble number `nibble` of 32 words to (integer - zero) * scale by table look-up. The table contains
// the 16 possible values twice, because the instruction uses 5 bits of a word as the index; the fifth is the
// lowest bit of the next nibble.
QVL_INLINE __m512i look_up(const uint8_t* words, int nibble, float scale, float zero) {
  const Floats integers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512 values = reinterpret_cast<__m512>((integers - zero) * scale);
  const __m512i table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values, values));
  const Halves shifted = load<Halves>(words) >> (4 * nibble);
  return _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(shifted), table);
}

template <int Group>
QVL_INLINE __m512i narrow_chunk(UnpackInt4<Group>, const UnpackTile& t, int64_t row, int i) {
  const Int4Chunk<Group> from(t, row, i);
  return look_up(from.words, from.nibble, from.scale, 8);
}

template <int Group>
QVL_INLINE __m512i narrow_chunk(UnpackGroups<4, Group>, const UnpackTile& t, int64_t row, int i) {
  const int64_t index = row * round_up(t.k, kUnit) + t.first_k + i;
  return look_up(static_cast<const uint8_t*>(t.weights) + index / kUnit * (kUnit / 2),
                 static_cast<int>(index % kUnit) / kChunk, float16_at(t.scales, index / Group),
                 float16_at(t.zeros, index / Group));
}

template <typename Unpack>
void unpack_to_bf16(const UnpackTile& t) {
  const int width = round_up(t.n_k, 2);
  for (int64_t r = 0; r < t.n_rows; ++r) {
    uint16_t* to = static_cast<uint16_t*>(t.tile) + r * width;
    for (int i = 0; i < width; i += kChunk) {
      store(to + i, narrow_chunk(Unpack(), t, t.first_row + r, i));
    }
  }
}
#endif

}  // namespace
