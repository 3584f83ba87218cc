// Matrix-vector products, the part shared by all storage types: y [n_x][rows] (+)= x W^T + bias for 1 to 8
// (kMaxRows) rows of x. A product reads W from memory once. A row of x is called an activation here. The
// inner loops are the classes `Rows` of matvec_bf16.h, matvec_float.h, matvec_int8.h, matvec_int4.h and
// matvec_groups.h.
//
// Layout of the work:
//
//                 columns of W ->
//               +--------------+--------------+----
//   kPanelRows  | kColumnBlock |              |        for each panel of 16 rows:
//   = 16 rows   |  R rows at   |              |          for each column block:
//               |  a time      |              |            for each R rows: for each N activations
//               +--------------+--------------+----            sums[R][N] in registers, += w * x
//               | next panel, prefetched concurrently
//
// A register block has R = RowCount rows and N activations, up to kXAtOnce, so that each loaded vector is
// used several times. Column blocks are narrow enough to keep their activations in the L1 cache; with one
// activation a column block is an entire row. The order of summation does not depend on the blocking: the
// result of an activation has the same bits in every batch.
//
// Cost: reads W once and computes 2 * rows * k * n_x operations; the files of the storage types contain the
// formulas. linear.cc contains the outer loop, which reuses cached parts of W for more than kMaxRows
// activations.
//
// Reference: reference::linear (reference/reference.cc), tests/csrc/test_kernels.py.
#pragma once

#include "cpu/kernels/simd.h"
#include "cpu/kernels/table.h"

namespace {

using qvl::cpu::Matvec;

constexpr int kPanelRows = 16;  // rows of a panel, processed with the same column block of x

// Write the sums of n rows of W, from `row` on, to y for activation x. Not inlined, so that the final
// rounding is the same in every kernel: inlined copies could differ in fused multiply-adds.
template <bool HasScale>
__attribute__((noinline)) void write_rows(const Matvec& p, int64_t row, int n, int x, const float* sums) {
  float* const y = p.y + x * p.y_stride + row;
  for (int i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? n - i : kLanes;
    Floats value = load_first(sums + i, count);
    if (HasScale) value *= load_first(static_cast<const float*>(p.scales) + row + i, count);
    if (p.bias != nullptr) value += load_first(p.bias + row + i, count);
    if (p.add) value += load_first(y + i, count);
    store_first(y + i, value, count);
  }
}

// Prefetches the weights, a cache line per call, in the order of memory, which suits the hardware prefetcher
// best.
class WeightPrefetcher {
 public:
  QVL_INLINE WeightPrefetcher(const Matvec& p, int64_t offset)
      : line_(static_cast<const char*>(p.weights) + offset) {}
  QVL_INLINE void next() {
    prefetch(line_);
    line_ += 64;
  }

 private:
  const char* line_;
};

// Distance of prefetched weights in bytes with one activation. With several activations it is a panel.
constexpr int64_t kPrefetchDistance = 65536;

// Load the sums of a register block; with `zero`, as for the first column block, set them to zero.
template <int RowCount, int XCount, int SumStride>
QVL_INLINE void load_sums(const Floats* from, bool zero, Floats (&sums)[RowCount][XCount]) {
#pragma GCC unroll 8
  for (int r = 0; r < RowCount; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < XCount; ++n) sums[r][n] = zero ? Floats{} : from[r * SumStride + n];
  }
}

template <int RowCount, int XCount, int SumStride>
QVL_INLINE void store_sums(const Floats (&sums)[RowCount][XCount], Floats* to) {
#pragma GCC unroll 8
  for (int r = 0; r < RowCount; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < XCount; ++n) to[r * SumStride + n] = sums[r][n];
  }
}

// Interface of the class `Rows` of a storage type:
//   kColumnBlock      columns of a column block
//   rows_at_once(n)   RowCount for n activations, so that the sums of kXAtOnce activations fit the registers;
//                     for one activation the measured optimum
//   row_bytes(k)      bytes of a row of weights, without scales
//   kHasScale         whether a finished row is multiplied by scales[row]
//   kXAtOnce          maximum number of activations of a register block
//   add<RowCount, XCount, Pass, Passes, SumStride>(p, row, x, first, end, prefetcher, sums)
//                     add the products of columns [first, end) with activations x to x + XCount - 1 to
//                     sums [RowCount][SumStride], which are uninitialised if first is 0. The same weights are
//                     read by `Passes` calls, of which this is number `Pass`; together they prefetch as many
//                     cache lines as one of them reads

// Multiply RowCount entire rows by one activation.
template <typename Rows, int RowCount>
QVL_INLINE void multiply_entire_rows(const Matvec& p, int64_t row, WeightPrefetcher& prefetcher, float* to) {
  Floats sums[RowCount];
  Rows::template add<RowCount, 1, 0, 1, 1>(p, row, /*x=*/0, /*first=*/0, p.k, prefetcher, sums);
#pragma GCC unroll 8
  for (int r = 0; r < RowCount; ++r) to[r] = sum(sums[r]);
}

// Process a column block for activations FirstX to XCount - 1, kXAtOnce at a time. The weights of the block
// stay in the L1 cache.
template <typename Rows, int RowCount, int XCount, int FirstX = 0>
QVL_INLINE void multiply_column_block(const Matvec& p, int64_t row, int first, int end,
                                      WeightPrefetcher& prefetcher, Floats* sums) {
  constexpr int GroupX = XCount - FirstX < Rows::kXAtOnce ? XCount - FirstX : Rows::kXAtOnce;
  constexpr int kPasses = (XCount + Rows::kXAtOnce - 1) / Rows::kXAtOnce;
  Rows::template add<RowCount, GroupX, FirstX / Rows::kXAtOnce, kPasses, XCount>(p, row, FirstX, first, end,
                                                                                 prefetcher, sums + FirstX);
  if constexpr (FirstX + GroupX < XCount)
    multiply_column_block<Rows, RowCount, XCount, FirstX + GroupX>(p, row, first, end, prefetcher, sums);
}

// Product with one activation, for rows [row, end).
template <typename Rows>
void matvec_one(const Matvec& p, int64_t row, int64_t end) {
  constexpr int RowCount = Rows::rows_at_once(1);
  WeightPrefetcher prefetcher(p, Rows::row_bytes(p.k) * row + kPrefetchDistance);
  constexpr int kWriteRows = 16 * RowCount;  // rows per call of write_rows
  float sums[kWriteRows];
  for (; row < end; row += kWriteRows) {
    const int n = end - row < kWriteRows ? static_cast<int>(end - row) : kWriteRows;
    int r = 0;
    for (; r + RowCount <= n; r += RowCount)
      multiply_entire_rows<Rows, RowCount>(p, row + r, prefetcher, sums + r);
    for (; r < n; ++r) multiply_entire_rows<Rows, 1>(p, row + r, prefetcher, sums + r);
    write_rows<Rows::kHasScale>(p, row, n, /*x=*/0, sums);
  }
}

// Product with XCount activations, for rows [row, end).
template <typename Rows, int XCount>
void matvec_many(const Matvec& p, int64_t row, int64_t end) {
  constexpr int RowCount = Rows::rows_at_once(XCount);
  const int64_t row_bytes = Rows::row_bytes(p.k);
  Floats sums[kPanelRows * XCount];
  WeightPrefetcher prefetcher(p, row_bytes * row + kPanelRows * row_bytes);
  for (; row < end; row += kPanelRows) {
    const int rows = end - row < kPanelRows ? static_cast<int>(end - row) : kPanelRows;
    for (int first_k = 0; first_k < p.k; first_k += Rows::kColumnBlock) {
      const int end_k = first_k + Rows::kColumnBlock < p.k ? first_k + Rows::kColumnBlock : p.k;
      int r = 0;
      for (; r + RowCount <= rows; r += RowCount)
        multiply_column_block<Rows, RowCount, XCount>(p, row + r, first_k, end_k, prefetcher,
                                                      sums + r * XCount);
      for (; r < rows; ++r)
        multiply_column_block<Rows, 1, XCount>(p, row + r, first_k, end_k, prefetcher, sums + r * XCount);
    }
    // Add the lanes of all sums; missing rows of the panel count as zeros.
    for (int i = rows * XCount; i < kPanelRows * XCount; ++i) sums[i] = Floats{};
    for (int n = 0; n < XCount; ++n) {
      float totals[kPanelRows];
      for (int r = 0; r < kPanelRows; r += kLanes) {
        Floats of_rows[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) of_rows[i] = sums[(r + i) * XCount + n];
        store(totals + r, sums_of(of_rows));
      }
      write_rows<Rows::kHasScale>(p, row, rows, n, totals);
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
