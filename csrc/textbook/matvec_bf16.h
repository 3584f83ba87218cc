// Matrix-vector product with bfloat16 weights, from the textbook loop to the production kernel.
//
//   weights [rows][k], 2 bytes each          x [k]   float32, 4 bytes each
//   row 0   w w w w w w w w ...              x
//   row 1   w w w w w w w w ...              x     y[row] = sum over k of w[row][k] * x[k]
//   ...                                      :
//
// Cost: each weight is read once, 2 rows k bytes, and takes one multiplication and one addition, 2 rows k
// FLOPs: one FLOP per byte. A core with AVX2 does 32 FLOPs per cycle and gets about 5 bytes per cycle from
// memory, so the bound is memory bandwidth. x (16 KiB for k = 4096) stays in the first-level cache. Until a
// version reads at memory speed, something else binds it; each names what.
#pragma once

#include "textbook/common.h"
#include "textbook/versions.h"

namespace {
namespace bf16 {

using qvl::textbook::Product;

// The textbook loop. Bound by latency: each addition waits for the one before, 4 cycles or so for 2 bytes. A
// compiler may not reorder floating-point additions, so it makes no vectors of this loop.
void v1(const Product& p) {
  const auto* w = static_cast<const uint16_t*>(p.weights);
  for (int64_t row = 0; row < p.rows; ++row, w += p.k) {
    float total = 0;
    for (int i = 0; i < p.k; ++i) total += to_float(w[i]) * p.x[i];
    p.y[row] = total;
  }
}

// kLanes columns at once (4, 8 or 16), each lane with a sum, added up at the end of the row. One fused
// multiply-add now does kLanes products. Still bound by latency: 4 cycles for 2 kLanes bytes.
void v2(const Product& p) {
  const auto* w = static_cast<const BFloat16*>(p.weights);
  for (int64_t row = 0; row < p.rows; ++row, w += p.k) {
    Floats total{};
    each_vector(p.k, [&](int i, int some) { total += some_of(w + i, some) * some_of(p.x + i, some); });
    p.y[row] = sum(total);
  }
}

// Four sums that do not wait for one another: the processor starts an addition while the previous ones are in
// flight. Bound by reads now: one row is one stream, and a core keeps too few of its cache lines in flight.
void v3(const Product& p) {
  constexpr int kSums = 4;
  const auto* w = static_cast<const BFloat16*>(p.weights);
  for (int64_t row = 0; row < p.rows; ++row, w += p.k) {
    Floats totals[kSums] = {};
    int i = 0;
    for (; i + kSums * kLanes <= p.k; i += kSums * kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < kSums; ++j) {
        totals[j] += load_floats(w + i + j * kLanes) * load<Floats>(p.x + i + j * kLanes);
      }
    }
    each_vector(p.k - i,
                [&](int j, int some) { totals[0] += some_of(w + i + j, some) * some_of(p.x + i + j, some); });
    p.y[row] = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
  }
}

// R rows of v4 and v5. Two weights are a 32-bit word: a shift makes a float32 of the lower, a mask of the
// upper. The production kernel's prepare_x puts the even and the odd elements of x apart to match.
template <int R>
QVL_INLINE void rows_of_pairs(const Product& p, int64_t row) {
  constexpr int kPairs = 2 * kLanes;
  const uint16_t* w = static_cast<const uint16_t*>(p.weights) + row * p.k;
  const auto* x = static_cast<const float*>(p.scratch);
  Floats low[R] = {}, high[R] = {};
  for (int i = 0; i < p.k; i += kPairs) {
    const Floats x_low = load<Floats>(x + i), x_high = load<Floats>(x + i + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Words pairs{};
      if (i + kPairs <= p.k) {
        pairs = load<Words>(w + int64_t{r} * p.k + i);
      } else {
        __builtin_memcpy(&pairs, w + int64_t{r} * p.k + i, static_cast<size_t>(p.k - i) * 2);
      }
      low[r] += even(pairs) * x_low;
      high[r] += odd(pairs) * x_high;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) p.y[row + r] = sum(low[r] + high[r]);
}

// One full-width load of weights for two vectors of products, and no widening: fewer instructions per weight,
// so more of the core is free, but no faster while one stream of reads binds. The rearranged x costs k
// operations once, for rows k products.
void v4(const Product& p) {
  qvl::cpu::QVL_KERNELS()->prepare_x[QVL_BFLOAT16](p.x, 0, 1, p.k, p.scratch);
  for (int64_t row = 0; row < p.rows; ++row) rows_of_pairs<1>(p, row);
}

// Four rows at once: four streams of reads, of which more lines are in flight than of one. A vector of x is
// loaded once for four products, and eight sums hide the latency. Bound by memory.
void v5(const Product& p) {
  constexpr int kRows = 4;
  qvl::cpu::QVL_KERNELS()->prepare_x[QVL_BFLOAT16](p.x, 0, 1, p.k, p.scratch);
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) rows_of_pairs<kRows>(p, row);
  for (; row < p.rows; ++row) rows_of_pairs<1>(p, row);
}

// The production kernel (cpu/kernels/matvec_bf16.h): wide pairs, read in memory order, with each cache line
// prefetched 64 KiB ahead, and all products of a row in one sum: one order of additions serves any number of
// activations, so a request gets the same bits alone and in a batch. With several activations it takes
// several rows at once, with one activation a single row: one thread with AVX2 is then slower than v5
// (README.md).
void v6(const Product& p) {
  const qvl::cpu::Kernels& kernels = *qvl::cpu::QVL_KERNELS();
  kernels.prepare_x[QVL_BFLOAT16](p.x, 0, 1, p.k, p.scratch);
  kernels.matvec[QVL_BFLOAT16]({p.weights, nullptr, p.k, p.scratch, 1, p.y, p.rows, nullptr, false}, 0,
                               p.rows);
}

}  // namespace bf16
}  // namespace
