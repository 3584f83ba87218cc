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
constexpr int kGroup = 4;       // activations that are multiplied at the same time

QVL_INLINE int round_up(int n, int unit) {
  return (n + unit - 1) / unit * unit;
}

// Ask for the bytes of `memory` that will be needed a little later.
QVL_INLINE void prefetch_all(const char* memory, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(memory + i);
}

QVL_INLINE void put(const Matvec& p, int64_t row, int x, float value) {
  float& y = p.y[x * p.y_stride + row];
  if (p.bias != nullptr) value += p.bias[row];
  y = p.add ? y + value : value;
}

// Rows has
//   kCut                   columns in a cut
//   kRows1, kRowsMany      rows at a time with one activation and with several: what fits into the registers
//   row_bytes(k)           of the weights
//   column_bytes(n)        of n columns of a row of weights
//   scale(p, row)          factor of a finished row
//   add<R, N>(p, row, x, first, end, sums)   add the products of columns first to end with activations x to
//                                            x + N - 1 to sums [R][N]
template <typename Rows, int R, int N>
QVL_INLINE void whole_rows(const Matvec& p, int64_t row) {
  Floats sums[R][N] = {};
  Rows::template add<R, N>(p, row, 0, 0, p.k, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) put(p, row + r, n, sum(sums[r][n]) * Rows::scale(p, row + r));
  }
}

template <typename Rows, int R, int N>
QVL_INLINE void cut_rows(const Matvec& p, int64_t row, int x, int first, int end, Floats* saved) {
  Floats sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = first == 0 ? Floats{} : saved[r * p.n_x + n];
  }
  Rows::template add<R, N>(p, row, x, first, end, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) saved[r * p.n_x + n] = sums[r][n];
  }
}

// All activations, a group of them after another; the rows' cut stays in the first-level cache meanwhile.
template <typename Rows, int R>
QVL_INLINE void cut_groups(const Matvec& p, int64_t row, int first, int end, Floats* saved) {
  for (int x = 0; x < p.n_x; x += kGroup) {
    switch (p.n_x - x) {
      case 1:
        cut_rows<Rows, R, 1>(p, row, x, first, end, saved + x);
        break;
      case 2:
        cut_rows<Rows, R, 2>(p, row, x, first, end, saved + x);
        break;
      case 3:
        cut_rows<Rows, R, 3>(p, row, x, first, end, saved + x);
        break;
      default:
        cut_rows<Rows, R, kGroup>(p, row, x, first, end, saved + x);
    }
  }
}

template <typename Rows>
void matvec_one(const Matvec& p, int64_t row, int64_t end) {
  for (; row + Rows::kRows1 <= end; row += Rows::kRows1) whole_rows<Rows, Rows::kRows1, 1>(p, row);
  for (; row < end; ++row) whole_rows<Rows, 1, 1>(p, row);
}

template <typename Rows>
void matvec_many(const Matvec& p, int64_t row, int64_t end) {
  constexpr int R = Rows::kRowsMany;
  const int64_t row_bytes = Rows::row_bytes(p.k);
  const char* weights = static_cast<const char*>(p.weights);
  Floats sums[kPanelRows * qvl::cpu::kMaxRows];
  for (; row < end; row += kPanelRows) {
    const int64_t panel_end = row + kPanelRows < end ? row + kPanelRows : end;
    for (int first = 0; first < p.k; first += Rows::kCut) {
      const int last = first + Rows::kCut < p.k ? first + Rows::kCut : p.k;
      // Ahead: the next cut of these rows, or the first cut of the next panel.
      const bool more = last < p.k;
      const int64_t ahead = more ? Rows::column_bytes(last) : kPanelRows * row_bytes;
      const int n_ahead = more && p.k - last < Rows::kCut ? p.k - last : Rows::kCut;
      const int64_t ahead_bytes = more || panel_end < end ? Rows::column_bytes(n_ahead) : 0;
      int64_t r = row;
      for (; r + R <= panel_end; r += R) {
        for (int i = 0; i < R; ++i) prefetch_all(weights + (r + i) * row_bytes + ahead, ahead_bytes);
        cut_groups<Rows, R>(p, r, first, last, sums + (r - row) * p.n_x);
      }
      for (; r < panel_end; ++r) cut_groups<Rows, 1>(p, r, first, last, sums + (r - row) * p.n_x);
    }
    for (int64_t r = row; r < panel_end; ++r) {
      for (int n = 0; n < p.n_x; ++n) put(p, r, n, sum(sums[(r - row) * p.n_x + n]) * Rows::scale(p, r));
    }
  }
}

template <typename Rows>
void matvec(const Matvec& p, int64_t row, int64_t end) {
  return p.n_x == 1 ? matvec_one<Rows>(p, row, end) : matvec_many<Rows>(p, row, end);
}

}  // namespace
