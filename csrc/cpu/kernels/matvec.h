// What the matrix-vector kernels share. Each streams its weights once, for up to kMaxRows activations.
//
// A kernel works on R rows of weights and N activations at a time, so that a vector loaded from either is
// used several times. With more than one activation the columns are cut so that a cut's activations stay in
// the first-level cache. The order in which a product's terms are added depends on none of this: a token's
// result is the same bits whatever is in the batch with it.
#pragma once

#include "cpu/kernels/simd.h"
#include "cpu/kernels/table.h"

namespace {

using qvl::cpu::Matvec;

constexpr int kPanelRows = 16;  // rows that take turns on a cut of the columns

// The sums of n rows with activation x. A function of its own, so that a row's last roundings are the same
// whichever kernel it comes from.
template <bool Scaled>
__attribute__((noinline)) void put(const Matvec& p, int64_t row, int n, int x, const float* sums) {
  float* const y = p.y + x * p.y_stride + row;
  for (int i = 0; i < n; i += kLanes) {
    const int some = n - i < kLanes ? n - i : kLanes;
    Floats value = load_some(sums + i, some);
    if (Scaled) value *= load_some(static_cast<const float*>(p.scales) + row + i, some);
    if (p.bias != nullptr) value += load_some(p.bias + row + i, some);
    if (p.add) value += load_some(y + i, some);
    store_some(y + i, value, some);
  }
}

// Asks for the lines of the weights in the order in which they lie in memory, some way ahead of the reading:
// that is what the processor's own prefetching follows best.
class NextLines {
 public:
  QVL_INLINE NextLines(const Matvec& p, int64_t offset)
      : line_(static_cast<const char*>(p.weights) + offset) {}
  QVL_INLINE void ask() {
    prefetch(line_);
    line_ += 64;
  }

 private:
  const char* line_;
};

constexpr int64_t kAheadOfOne = 65536;  // bytes, with one activation; with more it is a panel of rows

// Sums that stay in registers over a cut.
template <int R, int N, int Stride>
QVL_INLINE void take_sums(const Floats* from, bool begin, Floats (&sums)[R][N]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = begin ? Floats{} : from[r * Stride + n];
  }
}

template <int R, int N, int Stride>
QVL_INLINE void put_sums(const Floats (&sums)[R][N], Floats* to) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) to[r * Stride + n] = sums[r][n];
  }
}

// Rows has
//   kCut              columns in a cut
//   rows_at_once(n)   rows at a time with n activations: as many as keep a group's sums in registers; with
//                     one activation what was measured to be fastest
//   row_bytes(k)      of the weights
//   kScaled           whether a finished row has a factor
//   kGroup            activations that are multiplied at the same time
//   add<R, N, Turn, Turns, Stride>(p, row, x, first, end, ahead, sums)
//                     add the products of columns first to end with activations x to x + N - 1 to sums
//                     [R][Stride], which hold nothing yet where first is 0; in Turns calls for the same
//                     weights as many lines are asked for from `ahead` on as are read
template <typename Rows, int R>
QVL_INLINE void whole_rows(const Matvec& p, int64_t row, NextLines& ahead, float* to) {
  Floats sums[R];
  Rows::template add<R, 1, 0, 1, 1>(p, row, 0, 0, p.k, ahead, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) to[r] = sum(sums[r]);
}

// All N activations from X on, a group of them after another; the rows' cut stays in the first-level cache.
template <typename Rows, int R, int N, int X = 0>
QVL_INLINE void cut_rows(const Matvec& p, int64_t row, int first, int end, NextLines& ahead, Floats* sums) {
  constexpr int G = N - X < Rows::kGroup ? N - X : Rows::kGroup;
  constexpr int kTurns = (N + Rows::kGroup - 1) / Rows::kGroup;
  Rows::template add<R, G, X / Rows::kGroup, kTurns, N>(p, row, X, first, end, ahead, sums + X);
  if constexpr (X + G < N) cut_rows<Rows, R, N, X + G>(p, row, first, end, ahead, sums);
}

template <typename Rows>
void matvec_one(const Matvec& p, int64_t row, int64_t end) {
  constexpr int R = Rows::rows_at_once(1);
  NextLines ahead(p, Rows::row_bytes(p.k) * row + kAheadOfOne);
  constexpr int kRows = 16 * R;
  float sums[kRows];
  for (; row < end; row += kRows) {
    const int n = end - row < kRows ? static_cast<int>(end - row) : kRows;
    int r = 0;
    for (; r + R <= n; r += R) whole_rows<Rows, R>(p, row + r, ahead, sums + r);
    for (; r < n; ++r) whole_rows<Rows, 1>(p, row + r, ahead, sums + r);
    put<Rows::kScaled>(p, row, n, 0, sums);
  }
}

template <typename Rows, int N>
void matvec_many(const Matvec& p, int64_t row, int64_t end) {
  constexpr int R = Rows::rows_at_once(N);
  const int64_t row_bytes = Rows::row_bytes(p.k);
  Floats sums[kPanelRows * N];
  NextLines ahead(p, row_bytes * row + kPanelRows * row_bytes);
  for (; row < end; row += kPanelRows) {
    const int rows = end - row < kPanelRows ? static_cast<int>(end - row) : kPanelRows;
    for (int first = 0; first < p.k; first += Rows::kCut) {
      const int last = first + Rows::kCut < p.k ? first + Rows::kCut : p.k;
      int r = 0;
      for (; r + R <= rows; r += R) cut_rows<Rows, R, N>(p, row + r, first, last, ahead, sums + r * N);
      for (; r < rows; ++r) cut_rows<Rows, 1, N>(p, row + r, first, last, ahead, sums + r * N);
    }
    for (int i = rows * N; i < kPanelRows * N; ++i) sums[i] = Floats{};
    for (int n = 0; n < N; ++n) {
      float totals[kPanelRows];
      for (int r = 0; r < kPanelRows; r += kLanes) {
        Floats of_rows[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) of_rows[i] = sums[(r + i) * N + n];
        store(totals + r, sums_of(of_rows));
      }
      put<Rows::kScaled>(p, row, rows, n, totals);
    }
  }
}

template <typename Rows>
void matvec(const Matvec& p, int64_t row, int64_t end) {
  static_assert(qvl::cpu::kMaxRows == 8, "one case for each number of activations");
  switch (p.n_x) {
    case 1:
      return matvec_one<Rows>(p, row, end);
    case 2:
      return matvec_many<Rows, 2>(p, row, end);
    case 3:
      return matvec_many<Rows, 3>(p, row, end);
    case 4:
      return matvec_many<Rows, 4>(p, row, end);
    case 5:
      return matvec_many<Rows, 5>(p, row, end);
    case 6:
      return matvec_many<Rows, 6>(p, row, end);
    case 7:
      return matvec_many<Rows, 7>(p, row, end);
    default:
      return matvec_many<Rows, 8>(p, row, end);
  }
}

}  // namespace
