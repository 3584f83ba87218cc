// Matrix-vector product with float32 or float16 weights: y[n][row] = sum over k of w[row][k] * x[n][k].
//
// Layout, with L = kLanes:
//
//   weights, a row   [ w0 w1 .. w(L-1) | wL .. ]        4 or 2 bytes each, no padding
//   prepared x       [ x0 x1 .. x(L-1) | xL .. 0 0 ]    float32 [n_x][k padded with zeros to L]
//
// Cost. Bytes: 4 * rows * k (float16: 2 * rows * k), once for all rows of x. Operations: 2 * rows * k * n_x,
// that is n_x / 2 per byte (float16: n_x): memory-bound for few rows of x. float16 adds one conversion per
// vector.
//
// Reference: reference::linear in tests/csrc/test_kernels.py::test_linear; test_every_float16 covers all
// finite values.
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
      store(to + i, load_first(x + n * x_stride + i, k - i < kLanes ? k - i : kLanes));
    }
  }
}

// `Rows` for weights of type float or Float16; matvec.h documents the members.
template <typename Value>
struct RowsOf {
  static constexpr int kColumnBlock = 512;
  static constexpr int kXAtOnce = kLanes == 16 ? 4 : 2;
  static constexpr int rows_at_once(int n) { return n == 1 || kLanes == 16 ? 4 : 2; }
  static QVL_INLINE int64_t row_bytes(int k) { return int64_t{sizeof(Value)} * k; }
  static constexpr bool kHasScale = false;

  template <int RowCount, int XCount, int Pass, int Passes, int SumStride>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end,
                             WeightPrefetcher& prefetcher, Floats* stored_sums) {
    Floats sums[RowCount][XCount];
    load_sums<RowCount, XCount, SumStride>(stored_sums, first == 0, sums);
    const int k = p.k, width = round_up(k, kLanes);
    const float* x = static_cast<const float*>(p.x) + first_x * width;
    const Value* w = static_cast<const Value*>(p.weights) + row * k;
    int i = first;
    for (; i + kLanes <= end; i += kLanes) {
      Floats v[RowCount];
#pragma GCC unroll 8
      for (int r = 0; r < RowCount; ++r) {
        v[r] = load_floats(w + int64_t{r} * k + i);
        if (r % Passes == Pass && i * sizeof(Value) % 64 == 0) prefetcher.next();
      }
#pragma GCC unroll 8
      for (int n = 0; n < XCount; ++n) {
        const Floats a = load<Floats>(x + n * width + i);
#pragma GCC unroll 8
        for (int r = 0; r < RowCount; ++r) sums[r][n] += v[r] * a;
      }
    }
    if (i < end) {
      for (int r = 0; r < RowCount; ++r) {
        const Floats v = load_first(w + int64_t{r} * k + i, end - i);
        for (int n = 0; n < XCount; ++n) sums[r][n] += v * load<Floats>(x + n * width + i);
      }
    }
    store_sums<RowCount, XCount, SumStride>(sums, stored_sums);
  }
};

}  // namespace
