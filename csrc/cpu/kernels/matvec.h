// What the matrix-vector kernels share. Each streams its weights once, for up to kMaxRows activations.
//
// A kernel works on R rows of weights and N activations at a time, so that a vector loaded from either is
// used several times. The order in which a product's terms are added depends on neither: a token's result is
// the same bits whatever is in the batch with it.
#pragma once

#include "cpu/kernels/simd.h"
#include "cpu/kernels/table.h"

namespace {

using qvl::cpu::Matvec;

QVL_INLINE void put(const Matvec& p, int64_t row, int x, float value) {
  float& y = p.y[x * p.y_stride + row];
  if (p.bias != nullptr) value += p.bias[row];
  y = p.add ? y + value : value;
}

// Rows at a time: what fits into the registers.
template <int N>
constexpr int rows_at_once() {
  return kLanes == 16 ? (N <= 4 ? 4 : 2) : (N == 1 ? 4 : N <= 3 ? 2 : 1);
}

// Rows::template run<R, N>(product, row) for the rows, R at a time and then singly.
template <typename Rows, int N>
void matvec_n(const Matvec& p, int64_t row, int64_t end) {
  constexpr int R = rows_at_once<N>();
  for (; row + R <= end; row += R) Rows::template run<R, N>(p, row);
  for (; row < end; ++row) Rows::template run<1, N>(p, row);
}

template <typename Rows>
void matvec(const Matvec& p, int64_t row, int64_t end) {
  switch (p.n_x) {
    case 1:
      return matvec_n<Rows, 1>(p, row, end);
    case 2:
      return matvec_n<Rows, 2>(p, row, end);
    case 3:
      return matvec_n<Rows, 3>(p, row, end);
    case 4:
      return matvec_n<Rows, 4>(p, row, end);
    case 5:
      return matvec_n<Rows, 5>(p, row, end);
    case 6:
      return matvec_n<Rows, 6>(p, row, end);
    case 7:
      return matvec_n<Rows, 7>(p, row, end);
    default:
      return matvec_n<Rows, 8>(p, row, end);
  }
}

QVL_INLINE int round_up(int n, int unit) {
  return (n + unit - 1) / unit * unit;
}

}  // namespace
