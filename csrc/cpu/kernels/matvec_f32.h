// float32 weights [rows][k]; the activations are copied, padded with zero.
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

struct RowsF32 {
  template <int R, int N>
  static QVL_INLINE void run(const Matvec& p, int64_t row) {
    const int k = p.k, width = round_up(k, kLanes);
    const auto* x = static_cast<const float*>(p.x);
    const float* w[R];
    for (int r = 0; r < R; ++r) w[r] = static_cast<const float*>(p.weights) + (row + r) * k;
    Floats sums[R][N] = {};
    int i = 0;
    for (; i + kLanes <= k; i += kLanes) {
      Floats v[R];
      for (int r = 0; r < R; ++r) v[r] = load<Floats>(w[r] + i);
      for (int n = 0; n < N; ++n) {
        const Floats a = load<Floats>(x + n * width + i);
        for (int r = 0; r < R; ++r) sums[r][n] += v[r] * a;
      }
    }
    if (i < k) {
      for (int r = 0; r < R; ++r) {
        const Floats v = load_some(w[r] + i, k - i);
        for (int n = 0; n < N; ++n) sums[r][n] += v * load<Floats>(x + n * width + i);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) put(p, row + r, n, sum(sums[r][n]));
    }
  }
};

}  // namespace
