// Matrix-vector product with int4 weights and a bfloat16 scale per group of 64 or 128 values of a row:
// y[n][row] = sum over groups of scale * (sum over k of (nibble - 8) * x[n][k]), x quantized to 8 bits.
//
// Layout. 128 values of a row (a unit) are 32 little-endian 16-bit words; value 32 * j + i is nibble j of
// word i:
//
//   word i      bits 15-12   11-8      7-4       3-0
//               v[96 + i]  v[64 + i] v[32 + i]  v[i]
//
//   values      [rows][k padded to 128] nibbles, offset by 8
//   scales      [rows][padded k / group] bfloat16, after all values
//
//   half 0 of a unit: nibbles 0 and 1, one byte each:  v0 v32 v1 v33 .. v31 v63     nibbles<0>()
//   half 1          : nibbles 2 and 3:                 v64 v96 v65 v97 .. v127      nibbles<1>()
//
// All values of a half belong to the same group, for group sizes 64 and 128. prepare_int4 permutes x to the
// order of the bytes. Products are unsigned nibble * signed x; sums start at -8 times the sum of x
// (quantized_x.h).
//
// Cost. Bytes: rows * k * (1/2 + 2 / group), once for all rows of x: 0.53 per weight in groups of 64.
// Operations: 2 * rows * k * n_x on integers, almost 4 * n_x per byte. The 64 bytes of a unit take about 13
// instructions for one row of x with AVX-512 VBMI (int8: 3), so the product is bound by instructions rather
// than memory.
//
// Reference: reference::linear with the same rounding of activations,
// tests/csrc/test_kernels.py::test_linear.
#pragma once

#include "cpu/kernels/quantized_x.h"

namespace {

// Unpack a half of the words' nibbles to bytes: half 0 is nibbles 0 and 1, values 0 to 63 of the unit; half 1
// is nibbles 2 and 3. The two nibbles of a word become adjacent bytes. A vector thus never mixes groups
// of 64.
template <int Half>
QVL_INLINE UnsignedBytes nibbles(Halves words) {
#if defined(__AVX512VBMI__)
  // For each byte of the result, from the lowest: the number of its first bit in 64 bits of words.
  constexpr uint64_t kFrom = Half == 0 ? 0x3430242014100400u : 0x3C382C281C180C08u;
  const __m512i bytes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(kFrom)),
                                                     reinterpret_cast<__m512i>(words));
  return reinterpret_cast<UnsignedBytes>(bytes) & uint8_t{15};
#else
  const Halves low = Half == 0 ? words & 15 : words >> 8 & 15;
  const Halves high = Half == 0 ? words << 4 & 0xF00 : words >> 4 & 0xF00;
  return reinterpret_cast<UnsignedBytes>(low | high);
#endif
}

template <int Group>
size_t prepared_bytes_int4(int k, int n_x) {
  return static_cast<size_t>(QuantizedX<Group>::row_bytes(k) * n_x);
}

// Order of the bytes of x: in each half, of 64 values, value i becomes byte 2 * i and value 32 + i byte
// 2 * i + 1.
template <int Group>
void prepare_int4(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  prepare_quantized<Group>(x, x_stride, n_x, k, /*offset=*/8, prepared, [](const float* from, float* to) {
    for (int first = 0; first < kBlock; first += 64) {
      for (int i = 0; i < 32; ++i) {
        to[first + 2 * i] = from[first + i];
        to[first + 2 * i + 1] = from[first + 32 + i];
      }
    }
  });
}

// `Rows` for int4 weights; matvec.h documents the members.
template <int Group>
struct RowsInt4 {
  using X = QuantizedX<Group>;
  static constexpr int kColumnBlock = 2048;
  static constexpr int kXAtOnce = kLanes == 16 ? 4 : 2;
  static constexpr int rows_at_once(int n) { return n == 1 ? 3 : kLanes == 16 ? 4 : 2; }
  static QVL_INLINE int64_t row_bytes(int k) { return round_up(k, kUnit) / 2; }
  static constexpr bool kHasScale = false;

  template <int RowCount, int XCount, int Pass, int Passes, int SumStride>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end,
                             WeightPrefetcher& prefetcher, Floats* sums) {
    for (; end - first >= kBlock; first += kBlock) {
      add_units<RowCount, XCount, Pass, Passes, SumStride, kBlock / kUnit>(p, row, first_x, first, prefetcher,
                                                                           sums);
    }
    for (; first < end; first += kUnit)
      add_units<RowCount, XCount, Pass, Passes, SumStride, 1>(p, row, first_x, first, prefetcher, sums);
  }

  // Add `Units` units from column `first` on, all within one block (kBlock columns) of x.
  template <int RowCount, int XCount, int Pass, int Passes, int SumStride, int Units>
  static QVL_INLINE void add_units(const Matvec& p, int64_t row, int first_x, int first,
                                   WeightPrefetcher& prefetcher, Floats* sums) {
    constexpr int kScales = Units * kUnit / Group;
    const int64_t stride = row_bytes(p.k), scale_stride = round_up(p.k, kUnit) / Group;
    const int64_t x_stride = X::row_bytes(p.k);
    const uint8_t* w = static_cast<const uint8_t*>(p.weights) + row * stride + first / 2;
    const uint16_t* scales = static_cast<const uint16_t*>(p.scales) + row * scale_stride + first / Group;
    const char* block = X::block(p, first_x, first);
    const char* initial_sums = block + sizeof(Floats) + first % kBlock / Group * sizeof(Ints);
    const char* x = block + X::kValues + first % kBlock;

    float factors[RowCount][kLanes];
#pragma GCC unroll 8
    for (int r = 0; r < RowCount; ++r) {
      store(factors[r], widen(load_first_halves(scales + r * scale_stride, kScales)));
    }
    // Keep the factors in memory: broadcasting a memory operand of a multiplication costs nothing,
    // broadcasting a register takes two shuffles.
    asm volatile("" : "+m"(factors));
    Floats totals[RowCount][XCount] = {};
#pragma GCC unroll 4
    for (int u = 0; u < Units; ++u) {
      Ints dots[RowCount][XCount];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int g = (u * kUnit + half * 64) / Group;
        if (half * 64 % Group == 0) {
#pragma GCC unroll 8
          for (int n = 0; n < XCount; ++n) {
#pragma GCC unroll 8
            for (int r = 0; r < RowCount; ++r)
              dots[r][n] = load<Ints>(initial_sums + n * x_stride + g * sizeof(Ints));
          }
        }
#pragma GCC unroll 4
        for (int offset = 0; offset < 64; offset += kVector) {
          UnsignedBytes v[RowCount];
#pragma GCC unroll 8
          for (int r = 0; r < RowCount; ++r) {
            const uint8_t* words = w + r * stride + u * 64 + offset;
            v[r] = half == 0 ? nibbles<0>(load<Halves>(words)) : nibbles<1>(load<Halves>(words));
            if (r % Passes == Pass && offset == 0 && half == 0) prefetcher.next();
          }
#pragma GCC unroll 8
          for (int n = 0; n < XCount; ++n) {
            const SignedBytes a = load<SignedBytes>(x + n * x_stride + u * kUnit + half * 64 + offset);
#pragma GCC unroll 8
            for (int r = 0; r < RowCount; ++r) dots[r][n] = multiply_add(dots[r][n], v[r], a);
          }
        }
        if ((half + 1) * 64 % Group == 0) {
#pragma GCC unroll 8
          for (int r = 0; r < RowCount; ++r) {
            const Floats factor = broadcast(factors[r][g]);
#pragma GCC unroll 8
            for (int n = 0; n < XCount; ++n) totals[r][n] += to_floats(dots[r][n]) * factor;
          }
        }
      }
    }
    const char* blocks[XCount];
#pragma GCC unroll 8
    for (int n = 0; n < XCount; ++n) blocks[n] = block + n * x_stride;
    add_scaled<RowCount, XCount, SumStride>(totals, blocks, first == 0, sums);
  }
};

}  // namespace
