// Matrix-vector product with bfloat16 weights: y[n][row] = sum over k of w[row][k] * x[n][k], for 1 to 8 rows
// of x.
//
// Layout, with L = kLanes float32 lanes. Two adjacent weights are one 32-bit word: a shift converts the
// weight with even index to float32, a mask the weight with odd index. prepare_bf16 therefore separates the
// values of x with even and odd indices:
//
//   weights, a row         [ w0 w1 | w2 w3 | .. | w(2L-2) w(2L-1) | w(2L) .. ]      2 bytes each, no padding
//                            \___/ one word, one lane
//   prepared x, 2L values  [ x0 x2 .. x(2L-2) ][ x1 x3 .. x(2L-1) ]     float32
//                            even(words) * a +  odd(words) * b          2 multiply-adds for 2L weights
//
//   prepared x: [n_x][ceil(k / 2L)][2][L] float32, padded with zeros.
//
// Cost. Bytes: 2 * rows * k, once for all rows of x; the prepared x is read from the caches. Operations:
// 2 * rows * k * n_x, that is n_x per byte: memory-bound for few rows of x.
// time = max(2 * rows * k / bandwidth, 2 * rows * k * n_x / multiply-add rate).
//
// Reference: reference::linear (reference/reference.cc), in tests/csrc/test_kernels.py::test_linear; the same
// bits in every batch: test_linear_of_a_row_does_not_depend_on_the_others.
#pragma once

#include "cpu/kernels/matvec.h"

namespace {

constexpr int kPairs = 2 * kLanes;  // values in a vector of pairs

size_t prepared_bytes_bf16(int k, int n_x) {
  return static_cast<size_t>(round_up(k, kPairs)) * n_x * sizeof(float);
}

void prepare_bf16(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  auto* to = static_cast<float*>(prepared);
  for (int n = 0; n < n_x; ++n) {
    for (int i = 0; i < k; i += kPairs, to += kPairs) {
      const int count = k - i < kPairs ? k - i : kPairs;
      float values[kPairs] = {};
      __builtin_memcpy(values, x + n * x_stride + i, static_cast<size_t>(count) * sizeof(float));
      for (int j = 0; j < kLanes; ++j) {
        to[j] = values[2 * j];
        to[kLanes + j] = values[2 * j + 1];
      }
    }
  }
}

// `Rows` for bfloat16 weights; matvec.h documents the members.
struct RowsBf16 {
  static constexpr int kColumnBlock = 512;  // a multiple of kPairs
  static constexpr int kXAtOnce = kLanes == 16 ? 4 : 2;
  static constexpr int rows_at_once(int n) { return n == 1 ? 1 : kLanes == 16 ? 4 : 2; }
  static QVL_INLINE int64_t row_bytes(int k) { return int64_t{2} * k; }
  static constexpr bool kHasScale = false;

  template <int RowCount, int XCount, int Pass, int Passes, int SumStride>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end,
                             WeightPrefetcher& prefetcher, Floats* stored_sums) {
    Floats sums[RowCount][XCount];
    load_sums<RowCount, XCount, SumStride>(stored_sums, first == 0, sums);
    const int k = p.k, width = round_up(k, kPairs);
    const float* x = static_cast<const float*>(p.x) + first_x * width;
    const uint16_t* w = static_cast<const uint16_t*>(p.weights) + row * k;
    int i = first;
    for (; i + kPairs <= end; i += kPairs) {
      Words pairs[RowCount];
#pragma GCC unroll 8
      for (int r = 0; r < RowCount; ++r) {
        pairs[r] = load<Words>(w + int64_t{r} * k + i);
        if (r % Passes == Pass && i % 32 == 0) prefetcher.next();  // 32 weights: a cache line
      }
      step<RowCount, XCount>(pairs, x + i, width, sums);
    }
    if (i < end) {
      Words pairs[RowCount] = {};
      for (int r = 0; r < RowCount; ++r) {
        __builtin_memcpy(&pairs[r], w + int64_t{r} * k + i, static_cast<size_t>(end - i) * 2);
      }
      step<RowCount, XCount>(pairs, x + i, width, sums);
    }
    store_sums<RowCount, XCount, SumStride>(sums, stored_sums);
  }

  template <int RowCount, int XCount>
  static QVL_INLINE void step(const Words (&pairs)[RowCount], const float* x, int width,
                              Floats (&sums)[RowCount][XCount]) {
    Floats low[RowCount], high[RowCount];
#pragma GCC unroll 8
    for (int r = 0; r < RowCount; ++r) {
      low[r] = even(pairs[r]);
      high[r] = odd(pairs[r]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < XCount; ++n) {
      const Floats a = load<Floats>(x + n * width), b = load<Floats>(x + n * width + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < RowCount; ++r) {
        sums[r][n] += low[r] * a;
        sums[r][n] += high[r] * b;
      }
    }
  }
};

}  // namespace
