// float32 and float16 weights [rows][k]; the activations are copied, padded with zero.
#pragma once

#include "cpu/kernels/matvec.h"

namespace {

size_t prepared_bytes_f32(int k, int n_x) {
  return static_cast<size_t>(round_up(k, kLanes)) * n_x * sizeof(float);
}

void prepare_f32(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  auto* to = static_cast<float*>(prepared);
  const int width = round_up(k, kLanes);
  for (int n = 0; n < n_x; ++n, to += width) {
    for (int i = 0; i < k; i += kLanes) {
      store(to + i, load_some(x + n * x_stride + i, k - i < kLanes ? k - i : kLanes));
    }
  }
}

template <typename Value>
struct RowsOf {
  static constexpr int kCut = 512;
  static constexpr int kGroup = kLanes == 16 ? 4 : 2;
  static constexpr int rows_at_once(int n) { return n == 1 || kLanes == 16 ? 4 : 2; }
  static QVL_INLINE int64_t row_bytes(int k) { return int64_t{sizeof(Value)} * k; }
  static constexpr bool kScaled = false;

  template <int R, int N, int Turn, int Turns, int Stride>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end, NextLines& ahead,
                             Floats* saved) {
    Floats sums[R][N];
    take_sums<R, N, Stride>(saved, first == 0, sums);
    const int k = p.k, width = round_up(k, kLanes);
    const float* x = static_cast<const float*>(p.x) + first_x * width;
    const Value* w = static_cast<const Value*>(p.weights) + row * k;
    int i = first;
    for (; i + kLanes <= end; i += kLanes) {
      Floats v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        v[r] = load_floats(w + int64_t{r} * k + i);
        if (r % Turns == Turn && i * sizeof(Value) % 64 == 0) ahead.ask();
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Floats a = load<Floats>(x + n * width + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][n] += v[r] * a;
      }
    }
    if (i < end) {
      for (int r = 0; r < R; ++r) {
        const Floats v = load_some(w + int64_t{r} * k + i, end - i);
        for (int n = 0; n < N; ++n) sums[r][n] += v * load<Floats>(x + n * width + i);
      }
    }
    put_sums<R, N, Stride>(sums, saved);
  }
};

}  // namespace
