// bfloat16 weights [rows][k]. Two of them are a 32-bit word, from which a shift and a mask make two float32:
// so the activations are laid out with the even and the odd elements apart.
#pragma once

#include "cpu/kernels/matvec.h"

namespace {

constexpr int kPairs = 2 * kLanes;

size_t prepared_bytes_bf16(int k, int n_x) {
  return static_cast<size_t>(round_up(k, kPairs)) * n_x * sizeof(float);
}

void prepare_bf16(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  auto* to = static_cast<float*>(prepared);
  for (int n = 0; n < n_x; ++n) {
    for (int i = 0; i < k; i += kPairs, to += kPairs) {
      const int some = k - i < kPairs ? k - i : kPairs;
      float both[kPairs] = {};
      __builtin_memcpy(both, x + n * x_stride + i, static_cast<size_t>(some) * sizeof(float));
      for (int j = 0; j < kLanes; ++j) {
        to[j] = both[2 * j];
        to[kLanes + j] = both[2 * j + 1];
      }
    }
  }
}

struct RowsBf16 {
  static constexpr int kCut = 512;
  static constexpr int kGroup = kLanes == 16 ? 4 : 2;
  static constexpr int rows_at_once(int n) { return n == 1 ? 1 : kLanes == 16 ? 4 : 2; }
  static QVL_INLINE int64_t row_bytes(int k) { return int64_t{2} * k; }
  static constexpr bool kScaled = false;

  template <int R, int N, int Turn, int Turns, int Stride>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end, NextLines& ahead,
                             Floats* saved) {
    Floats sums[R][N];
    take_sums<R, N, Stride>(saved, first == 0, sums);
    const int k = p.k, width = round_up(k, kPairs);
    const float* x = static_cast<const float*>(p.x) + first_x * width;
    const uint16_t* w = static_cast<const uint16_t*>(p.weights) + row * k;
    int i = first;
    for (; i + kPairs <= end; i += kPairs) {
      Words pairs[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        pairs[r] = load<Words>(w + int64_t{r} * k + i);
        if (r % Turns == Turn && i % 32 == 0) ahead.ask();
      }
      step<R, N>(pairs, x + i, width, sums);
    }
    if (i < end) {
      Words pairs[R] = {};
      for (int r = 0; r < R; ++r) {
        __builtin_memcpy(&pairs[r], w + int64_t{r} * k + i, static_cast<size_t>(end - i) * 2);
      }
      step<R, N>(pairs, x + i, width, sums);
    }
    put_sums<R, N, Stride>(sums, saved);
  }

  template <int R, int N>
  static QVL_INLINE void step(const Words (&pairs)[R], const float* x, int width, Floats (&sums)[R][N]) {
    Floats low[R], high[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      low[r] = even(pairs[r]);
      high[r] = odd(pairs[r]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Floats a = load<Floats>(x + n * width), b = load<Floats>(x + n * width + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[r][n] += low[r] * a;
        sums[r][n] += high[r] * b;
      }
    }
  }
};

}  // namespace
