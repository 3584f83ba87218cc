// Matrix-vector product with int4 weights, from the textbook loop to the production kernel. Group size 128.
//
// A group, 128 values of a row, has 32 words of 16 bits; nibble j of word i is value 32 * j + i, with an
// offset of 8:
//
//   bits     15..12        11..8         7..4          3..0
//   word 0   value 96      value 64      value 32      value 0
//   word 1   value 97      value 65      value 33      value 1         and one bfloat16 scale per group
//   ...
//   word 31  value 127     value 95      value 63      value 31
//
// Cost: rows * k / 2 bytes of values and rows * k / 64 of scales, for 2 * rows * k FLOPs: four FLOPs per
// byte. The lower bound of the time is still given by memory bandwidth, but unpacking a value costs more than
// its product, so the number of instructions per weight determines the speed of most versions.
#pragma once

#include "cpu/kernels/matvec_int4.h"
#include "textbook/common.h"
#include "textbook/versions.h"

namespace {
namespace int4 {

using qvl::textbook::Product;

constexpr int kGroup = 128;

// Scale of a group; `group`: index over all rows.
QVL_INLINE float scale_at(const Product& p, int64_t group) {
  return to_float(static_cast<const uint16_t*>(p.scales)[group]);
}

// Unpack each value to float32 and multiply. Bound by instructions: about ten per weight of half a byte.
void v1(const Product& p) {
  const int width = round_up(p.k, kGroup);
  for (int64_t row = 0; row < p.rows; ++row) {
    const uint16_t* words = static_cast<const uint16_t*>(p.weights) + row * width / 4;
    float total = 0;
    for (int i = 0; i < p.k; ++i) {
      const int nibble = words[i / kGroup * 32 + i % 32] >> (i % kGroup / 32 * 4) & 15;
      total += static_cast<float>(nibble - 8) * scale_at(p, (row * width + i) / kGroup) * p.x[i];
    }
    p.y[row] = total;
  }
}

// kLanes values at a time. Adjacent values of a row are the same nibble of adjacent words, so one shift and
// one mask unpack a whole vector. The scale is applied to the sum of a group, outside the inner loop. x is
// padded with zeros to whole groups. Bound by instructions: load, shift, mask, widen, subtract, convert,
// multiply-add for kLanes weights.
void v2(const Product& p) {
  const int width = round_up(p.k, kGroup);
  auto* x = static_cast<float*>(p.scratch);
  for (int i = 0; i < width; ++i) x[i] = i < p.k ? p.x[i] : 0;
  const auto* words = static_cast<const uint16_t*>(p.weights);
  for (int64_t row = 0; row < p.rows; ++row) {
    Floats total{};
    for (int first = 0; first < width; first += kGroup, words += 32) {
      Floats group{};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < 32; i += kLanes) {
          const Ints nibbles =
              reinterpret_cast<Ints>(widen_halves(load<HalfWords>(words + i) >> (4 * j) & 15));
          group += to_floats(nibbles - 8) * load<Floats>(x + first + 32 * j + i);
        }
      }
      total += group * scale_at(p, (row * width + first) / kGroup);
    }
    p.y[row] = sum(total);
  }
}

// Products of R rows, for v3 to v5. x is quantized to 8 bits in blocks (cpu/kernels/quantized_x.h): a block
// contains a float32 scale for each 32-bit lane, the initial values of the sums for each group of weights,
// and the int8 values in the order of the nibbles. Prefetch: for each cache line of weights read, prefetch
// one; these are consecutive lines, from kAhead bytes after the first row's start on.
template <int R, bool Prefetch = false>
QVL_INLINE void integer_rows(const Product& p, int64_t row) {
  constexpr int kAhead = 65536;  // bytes
  using X = QuantizedX<kGroup>;
  const int groups = round_up(p.k, kGroup) / kGroup;
  const uint8_t* w = static_cast<const uint8_t*>(p.weights) + row * groups * (kGroup / 2);
  const uint8_t* prefetch_from = w + kAhead;
  const char* block = static_cast<const char*>(p.scratch);
  Floats totals[R] = {};
  for (int g = 0; g < groups; block += X::kBytes) {
    Floats block_sums[R] = {};
    for (int i = 0; i < X::kGroups && g < groups; ++i, ++g) {
      const char* x = block + X::kValues + i * kGroup;
      Ints dots[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        dots[r] = load<Ints>(block + (1 + i) * sizeof(Ints));
        if (Prefetch) prefetch(prefetch_from), prefetch_from += 64;  // a group has 64 bytes, a cache line
      }
#pragma GCC unroll 8
      for (int offset = 0; offset < kGroup; offset += kVector) {
        const SignedBytes bytes = load<SignedBytes>(x + offset);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Halves words =
              load<Halves>(w + (int64_t{r} * groups + g) * (kGroup / 2) + offset % (kGroup / 2));
          dots[r] = multiply_add(dots[r], offset < kGroup / 2 ? nibbles<0>(words) : nibbles<1>(words), bytes);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        block_sums[r] += to_floats(dots[r]) * scale_at(p, (row + r) * groups + g);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) totals[r] += block_sums[r] * load<Floats>(block);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) p.y[row + r] = sum(totals[r]);
}

// Activations as int8, so the products are integers: vpdpbusd (AVX-512), or vpmaddubsw and vpmaddwd (AVX2),
// multiply and add 4 * kLanes bytes, and unpacking yields bytes instead of floats, 4 times as many per
// vector. The offset 8 of the weights is not subtracted: a sum starts at -8 times the sum of the
// activations. The rounding error of an activation is at most 1/254 of the largest of the 32 activations that
// share its scale; the test's reference rounds in the same way. Bound by instructions: load, shifts and masks
// of two nibbles, multiply-add.
void v3(const Product& p) {
  qvl::cpu::QVL_KERNELS()->prepare_x[QVL_INT4_G128](p.x, /*x_stride=*/0, /*n_x=*/1, p.k, p.scratch);
  for (int64_t row = 0; row < p.rows; ++row) integer_rows<1>(p, row);
}

// v4 and v5: three rows at a time. A vector of x and its scales are loaded once for three rows, and the three
// sums are independent. AVX2 lacks the registers for more rows. With weights in memory v4 is no faster than
// v3: it reads three streams, each a row of 2 KiB (k = 4096) or 5.4 KiB (k = 11008), and the hardware
// prefetcher restarts for each of them.
template <bool Prefetch>
QVL_INLINE void groups_of_rows(const Product& p) {
  constexpr int kRows = 3;
  qvl::cpu::QVL_KERNELS()->prepare_x[QVL_INT4_G128](p.x, /*x_stride=*/0, /*n_x=*/1, p.k, p.scratch);
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) integer_rows<kRows, Prefetch>(p, row);
  for (; row < p.rows; ++row) integer_rows<1, Prefetch>(p, row);
}
void v4(const Product& p) {
  groups_of_rows<false>(p);
}

// v4 with prefetches: for each cache line read, one line in memory order, from 64 KiB after the start of the
// three rows on.
void v5(const Product& p) {
  groups_of_rows<true>(p);
}

// The production kernel (cpu/kernels/matvec_int4.h): v5 with the groups of a block unrolled and their scales
// converted together.
void v6(const Product& p) {
  const qvl::cpu::Kernels& kernels = *qvl::cpu::QVL_KERNELS();
  kernels.prepare_x[QVL_INT4_G128](p.x, /*x_stride=*/0, /*n_x=*/1, p.k, p.scratch);
  kernels.matvec[QVL_INT4_G128]({p.weights, p.scales, p.k, p.scratch, /*n_x=*/1, p.y, p.rows,
                                 /*bias=*/nullptr, /*add=*/false, /*zeros=*/nullptr},
                                0, p.rows);
}

}  // namespace int4
}  // namespace
