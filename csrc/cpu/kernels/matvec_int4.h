// int4 weights: 128 values of a row are 32 words of 16 bits; value 32 j + i is nibble j of word i, plus 8. A
// bfloat16 scale for each group of 64 or 128 values.
//
// The 8 is taken off in the sums: they begin with -8 times the sum of the activations, which prepare_x works
// out once for all rows.
#pragma once

#include "cpu/kernels/quantised_x.h"

namespace {

// Per activation row and 128 values: the beginnings of the sums, Ints [128 / Group]; int16 values [128].
// After all units the float32 scales of the blocks, padded to 64 bytes.
template <int Group>
struct Int4X {
  static constexpr int kGroups = kUnit / Group;
  static constexpr int64_t kSums = kGroups * sizeof(Ints);
  static constexpr int64_t kStep = kSums + kUnit * 2;
  int units;
  int64_t scales, bytes;  // where the scales begin, and the whole

  explicit Int4X(int k) {
    units = round_up(k, kUnit) / kUnit;
    scales = units * kStep;
    bytes = scales + round_up(round_up(k, kBlock) / kBlock * 4, 64);
  }
};

template <int Group>
size_t prepared_bytes_int4(int k, int n_x) {
  return static_cast<size_t>(Int4X<Group>(k).bytes * n_x);
}

template <int Group>
void prepare_int4(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  const Int4X<Group> layout(k);
  Shorts minus_8;
  for (int i = 0; i < 2 * kLanes; ++i) minus_8[i] = -8;
  for (int n = 0; n < n_x; ++n) {
    char* const to = static_cast<char*>(prepared) + n * layout.bytes;
    for (int first = 0; first < k; first += kBlock) {
      const int given = k - first < kBlock ? k - first : kBlock;
      int16_t values[kBlock];
      const float scale = quantise_block(x + n * x_stride + first, given, round_up(given, kUnit), values);
      __builtin_memcpy(to + layout.scales + first / kBlock * 4, &scale, sizeof scale);
      for (int i = 0; i < given; i += kUnit) {
        char* const unit = to + (first + i) / kUnit * Int4X<Group>::kStep;
        __builtin_memcpy(unit + Int4X<Group>::kSums, values + i, kUnit * sizeof(int16_t));
        for (int g = 0; g < Int4X<Group>::kGroups; ++g) {
          Ints begin{};
          for (int j = 0; j < Group; j += 2 * kLanes) {
            begin = multiply_add(begin, minus_8, load<Shorts>(values + i + g * Group + j));
          }
          store(unit + g * sizeof(Ints), begin);
        }
      }
    }
  }
}

template <int Group>
struct RowsInt4 {
  static constexpr int kCut = kBlock;
  static constexpr int kGroup = 8;
  static constexpr int rows_at_once(int n) { return n == 1 ? 4 : n <= 4 && kLanes == 16 ? 2 : 1; }
  static QVL_INLINE int64_t row_bytes(int k) { return round_up(k, kUnit) / 2; }
  static QVL_INLINE int64_t column_bytes(int n) { return n / 2; }
  static QVL_INLINE float scale(const Matvec&, int64_t) { return 1; }

  template <int R, int N, int Turn, int Turns>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end, int64_t ahead,
                             Floats (&sums)[R][N]) {
    for (; first < end; first += kBlock) {
      add_block<R, N, Turn, Turns>(p, row, first_x, first, end - first < kBlock ? end - first : kBlock, ahead,
                                   sums);
    }
  }

  // n columns from `first` on, which share a scale of the activations.
  template <int R, int N, int Turn, int Turns>
  static QVL_INLINE void add_block(const Matvec& p, int64_t row, int first_x, int first, int n_k,
                                   int64_t ahead, Floats (&sums)[R][N]) {
    const Int4X<Group> layout(p.k);
    constexpr int kGroups = Int4X<Group>::kGroups;
    const int n_units = round_up(n_k, kUnit) / kUnit;
    const int64_t stride = row_bytes(p.k);
    const uint8_t* w = static_cast<const uint8_t*>(p.weights) + row * stride + first / 2;
    const uint16_t* scales =
        static_cast<const uint16_t*>(p.scales) + row * layout.units * kGroups + first / Group;
    const char* x = static_cast<const char*>(p.x) + first_x * layout.bytes;
    const char* unit = x + first / kUnit * Int4X<Group>::kStep;

    constexpr int kScales = kBlock / Group;
    float factors[R][kScales + kLanes];
    for (int g = 0; g < n_units * kGroups; g += kLanes) {
      const int some = n_units * kGroups - g < kLanes ? n_units * kGroups - g : kLanes;
      for (int r = 0; r < R; ++r) {
        HalfWords halves{};
        __builtin_memcpy(&halves, scales + int64_t{r} * layout.units * kGroups + g,
                         static_cast<size_t>(some) * 2);
        store(factors[r] + g, widen(halves));
      }
    }
    Floats totals[R][N] = {};
    for (int u = 0; u < n_units; ++u, unit += Int4X<Group>::kStep) {
      Ints dots[R][N][kGroups];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
          const Ints begin = load<Ints>(unit + n * layout.bytes + g * sizeof(Ints));
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) dots[r][n][g] = begin;
        }
      }
#pragma GCC unroll 4
      for (int part = 0; part < 32; part += 2 * kLanes) {  // 32 words of 16 bits, a vector of them at a time
        Halves words[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          words[r] = load<Halves>(w + r * stride + u * (kUnit / 2) + 2 * part);
          if (r % Turns == Turn && part == 0) prefetch(w + r * stride + u * (kUnit / 2) + ahead);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Shorts v[R];
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            v[r] = reinterpret_cast<Shorts>(j == 3 ? words[r] >> 12 : words[r] >> (4 * j) & 15);
          }
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) {
            const Shorts a =
                load<Shorts>(unit + n * layout.bytes + Int4X<Group>::kSums + 2 * (32 * j + part));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
              dots[r][n][32 * j / Group] = multiply_add(dots[r][n][32 * j / Group], v[r], a);
            }
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
          const Floats factor = all(factors[r][u * kGroups + g]);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) totals[r][n] += to_floats(dots[r][n][g]) * factor;
        }
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float x_scale;
      __builtin_memcpy(&x_scale, x + n * layout.bytes + layout.scales + first / kBlock * 4, sizeof x_scale);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][n] += totals[r][n] * x_scale;
    }
  }
};

}  // namespace
