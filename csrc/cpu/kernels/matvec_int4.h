// int4 weights: 128 values of a row are 32 words of 16 bits; value 32 j + i is nibble j of word i, plus 8. A
// bfloat16 scale for each group of 64 or 128 values.
//
// The 8 is taken off in the sums: they begin with -8 times the sum of the activations, which prepare_x works
// out once for all rows.
#pragma once

#include "cpu/kernels/quantised_x.h"

namespace {

// Per activation row and 128 values: the beginnings of the sums, Ints [128 / Group]; int16 values [128]; the
// scale, in 64 bytes of its own so that all stays aligned.
template <int Group>
struct Int4X {
  static constexpr size_t kSums = (kUnit / Group) * sizeof(Ints);
  static constexpr size_t kStep = kSums + kUnit * 2 + 64;
};

template <int Group>
size_t prepared_bytes_int4(int k, int n_x) {
  return Int4X<Group>::kStep * static_cast<size_t>(round_up(k, kUnit) / kUnit) * n_x;
}

template <int Group>
void prepare_int4(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  auto* to = static_cast<char*>(prepared);
  for (int n = 0; n < n_x; ++n) {
    for (int first = 0; first < k; first += kUnit, to += Int4X<Group>::kStep) {
      auto* values = reinterpret_cast<int16_t*>(to + Int4X<Group>::kSums);
      const int given = k - first < kUnit ? k - first : kUnit;
      const float scale = quantise_block(x + n * x_stride + first, given, kUnit, values);
      __builtin_memcpy(values + kUnit, &scale, sizeof scale);
      Shorts minus_8;
      for (int i = 0; i < 2 * kLanes; ++i) minus_8[i] = -8;
      for (int g = 0; g < kUnit / Group; ++g) {
        Ints begin{};
        for (int i = 0; i < Group; i += 2 * kLanes) {
          begin = multiply_add(begin, minus_8, load<Shorts>(values + g * Group + i));
        }
        store(to + g * sizeof(Ints), begin);
      }
    }
  }
}

template <int Group>
struct RowsInt4 {
  template <int R, int N>
  static QVL_INLINE void run(const Matvec& p, int64_t row) {
    const int units = round_up(p.k, kUnit) / kUnit;
    constexpr int kGroups = kUnit / Group;
    const uint8_t* w = static_cast<const uint8_t*>(p.weights) + row * units * (kUnit / 2);
    const uint16_t* scales = static_cast<const uint16_t*>(p.scales) + row * units * kGroups;
    const auto* x = static_cast<const char*>(p.x);
    Floats sums[R][N] = {};
    for (int u = 0; u < units; ++u) {
      Ints dots[R][N][kGroups];
      for (int n = 0; n < N; ++n) {
        for (int g = 0; g < kGroups; ++g) {
          const Ints begin = load<Ints>(at(x, units, n, u) + g * sizeof(Ints));
          for (int r = 0; r < R; ++r) dots[r][n][g] = begin;
        }
      }
      for (int part = 0; part < 32; part += 2 * kLanes) {  // 32 words of 16 bits, a vector of them at a time
        Halves words[R];
        for (int r = 0; r < R; ++r) words[r] = load<Halves>(w + (r * units + u) * (kUnit / 2) + 2 * part);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Shorts v[R];
          for (int r = 0; r < R; ++r) {
            const Halves nibbles = j == 3 ? words[r] >> 12 : words[r] >> (4 * j) & 15;
            v[r] = reinterpret_cast<Shorts>(nibbles);
          }
          for (int n = 0; n < N; ++n) {
            const Shorts a = load<Shorts>(at(x, units, n, u) + Int4X<Group>::kSums + 2 * (32 * j + part));
            for (int r = 0; r < R; ++r) {
              Ints& dot = dots[r][n][32 * j / Group];
              dot = multiply_add(dot, v[r], a);
            }
          }
        }
      }
      for (int n = 0; n < N; ++n) {
        float x_scale;
        __builtin_memcpy(&x_scale, at(x, units, n, u) + Int4X<Group>::kSums + kUnit * 2, sizeof x_scale);
        for (int r = 0; r < R; ++r) {
          for (int g = 0; g < kGroups; ++g) {
            const uint32_t bits = static_cast<uint32_t>(scales[(r * units + u) * kGroups + g]) << 16;
            float scale;
            __builtin_memcpy(&scale, &bits, sizeof scale);
            sums[r][n] += to_floats(dots[r][n][g]) * (scale * x_scale);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) put(p, row + r, n, sum(sums[r][n]));
    }
  }

  static QVL_INLINE const char* at(const char* x, int units, int n, int u) {
    return x + (static_cast<size_t>(n) * units + u) * Int4X<Group>::kStep;
  }
};

}  // namespace
