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
  const int width = round_up(k, kPairs);
  for (int n = 0; n < n_x; ++n, to += width) {
    for (int i = 0; i < width; ++i) {
      const int place = i / kPairs * kPairs + i % 2 * kLanes + i % kPairs / 2;
      to[place] = i < k ? x[n * x_stride + i] : 0.0F;
    }
  }
}

struct RowsBf16 {
  template <int R, int N>
  static QVL_INLINE void run(const Matvec& p, int64_t row) {
    const int k = p.k, width = round_up(k, kPairs);
    const auto* x = static_cast<const float*>(p.x);
    const uint16_t* w[R];
    for (int r = 0; r < R; ++r) w[r] = static_cast<const uint16_t*>(p.weights) + (row + r) * k;
    Floats sums[R][N] = {};
    int i = 0;
    for (; i + kPairs <= k; i += kPairs) {
      Floats low[R], high[R];
      for (int r = 0; r < R; ++r) {
        const Words pairs = load<Words>(w[r] + i);
        low[r] = even(pairs);
        high[r] = odd(pairs);
      }
      step<R, N>(low, high, x + i, width, sums);
    }
    if (i < k) {
      Floats low[R], high[R];
      for (int r = 0; r < R; ++r) {
        Words pairs{};
        __builtin_memcpy(&pairs, w[r] + i, static_cast<size_t>(k - i) * 2);
        low[r] = even(pairs);
        high[r] = odd(pairs);
      }
      step<R, N>(low, high, x + i, width, sums);
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) put(p, row + r, n, sum(sums[r][n]));
    }
  }

  template <int R, int N>
  static QVL_INLINE void step(const Floats* low, const Floats* high, const float* x, int width,
                              Floats (*sums)[N]) {
    for (int n = 0; n < N; ++n) {
      const Floats a = load<Floats>(x + n * width), b = load<Floats>(x + n * width + kLanes);
      for (int r = 0; r < R; ++r) {
        sums[r][n] += low[r] * a;
        sums[r][n] += high[r] * b;
      }
    }
  }
};

}  // namespace
