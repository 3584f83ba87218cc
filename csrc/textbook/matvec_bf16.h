// Matrix-vector product with bfloat16 weights, from the textbook loop to the production kernel.
//
//   weights [rows][k], 2 bytes each          x [k]   float32, 4 bytes each
//   row 0   w w w w w w w w ...              x
//   row 1   w w w w w w w w ...              x     y[row] = sum over k of w[row][k] * x[k]
//   ...                                      :
//
// Cost: each weight is read once, 2 * rows * k bytes, for one multiplication and one addition, 2 * rows * k
// FLOPs: one FLOP per byte. A core with AVX2 executes 32 FLOPs per cycle and reads about 5 bytes per cycle
// from memory, so the bound is memory bandwidth. x (16 KiB for k = 4096) stays in the L1 cache. Versions that
// do not reach memory bandwidth name their bottleneck.
#pragma once

#include "textbook/common.h"
#include "textbook/versions.h"

namespace {
namespace bf16 {

using qvl::textbook::Product;

// The textbook loop. Bound by latency: each addition waits for the previous one, about 4 cycles per weight of
// 2 bytes. The compiler must not reorder floating-point additions, so it does not vectorise this loop.
void v1(const Product& p) {
  const auto* w = static_cast<const uint16_t*>(p.weights);
  for (int64_t row = 0; row < p.rows; ++row, w += p.k) {
    float total = 0;
    for (int i = 0; i < p.k; ++i) total += to_float(w[i]) * p.x[i];
    p.y[row] = total;
  }
}

// kLanes columns at a time (4, 8 or 16, by the ISA), one sum per lane; the lanes are added at the end of the
// row. One multiply-add computes kLanes products. Still bound by latency: 4 cycles per 2 * kLanes bytes.
void v2(const Product& p) {
  const auto* w = static_cast<const BFloat16*>(p.weights);
  for (int64_t row = 0; row < p.rows; ++row, w += p.k) {
    Floats total{};
    each_vector(
        p.k, [&](int i, int count) { total += load_elements(w + i, count) * load_elements(p.x + i, count); });
    p.y[row] = sum(total);
  }
}

// Four independent sums: the processor starts an addition while the previous ones are in flight. Now bound by
// reads: a row is a single stream, of which a core keeps too few cache lines in flight.
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
    each_vector(p.k - i, [&](int j, int count) {
      totals[0] += load_elements(w + i + j, count) * load_elements(p.x + i + j, count);
    });
    p.y[row] = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
  }
}

// Products of R rows, for v4 and v5. A 32-bit word contains two weights: a shift converts the lower (even)
// one to float32, a mask the upper (odd) one. x is rearranged to match: prepare_x of the production kernel
// stores, for each vector of words, the even elements and then the odd elements.
template <int R>
QVL_INLINE void multiply_rows(const Product& p, int64_t row) {
  constexpr int kWeights = 2 * kLanes;
  const uint16_t* w = static_cast<const uint16_t*>(p.weights) + row * p.k;
  const auto* x = static_cast<const float*>(p.scratch);
  Floats even_sums[R] = {}, odd_sums[R] = {};
  for (int i = 0; i < p.k; i += kWeights) {
    const Floats x_even = load<Floats>(x + i), x_odd = load<Floats>(x + i + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Words words{};
      if (i + kWeights <= p.k) {
        words = load<Words>(w + int64_t{r} * p.k + i);
      } else {
        __builtin_memcpy(&words, w + int64_t{r} * p.k + i, static_cast<size_t>(p.k - i) * 2);
      }
      even_sums[r] += even(words) * x_even;
      odd_sums[r] += odd(words) * x_odd;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) p.y[row + r] = sum(even_sums[r] + odd_sums[r]);
}

// One full-width load (2 * kLanes weights) for two vectors of products, instead of two loads that widen each
// weight to 32 bits: fewer instructions per weight, but no faster, because a single stream of reads remains
// the bottleneck. Rearranging x costs k operations, once for all rows.
void v4(const Product& p) {
  qvl::cpu::QVL_KERNELS()->prepare_x[QVL_BFLOAT16](p.x, /*x_stride=*/0, /*n_x=*/1, p.k, p.scratch);
  for (int64_t row = 0; row < p.rows; ++row) multiply_rows<1>(p, row);
}

// Four rows at a time: four streams of reads keep more cache lines in flight than one. A vector of x is
// loaded once for four rows, and eight sums (even and odd values of each row) hide the latency of additions.
// Bound by memory bandwidth.
void v5(const Product& p) {
  constexpr int kRows = 4;
  qvl::cpu::QVL_KERNELS()->prepare_x[QVL_BFLOAT16](p.x, /*x_stride=*/0, /*n_x=*/1, p.k, p.scratch);
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) multiply_rows<kRows>(p, row);
  for (; row < p.rows; ++row) multiply_rows<1>(p, row);
}

// The production kernel (cpu/kernels/matvec_bf16.h): full-width loads in memory order, with each cache line
// prefetched 64 KiB ahead, and all products of a row in one vector of sums. The order of additions does not
// depend on the number of activations (vectors x), so a request gets the same bits with and without batching.
// With several activations the kernel processes several rows at a time; with one activation, as here, a
// single row, which on one thread with AVX2 is slower than v5 (README.md).
void v6(const Product& p) {
  const qvl::cpu::Kernels& kernels = *qvl::cpu::QVL_KERNELS();
  kernels.prepare_x[QVL_BFLOAT16](p.x, /*x_stride=*/0, /*n_x=*/1, p.k, p.scratch);
  kernels.matvec[QVL_BFLOAT16]({p.weights, /*scales=*/nullptr, p.k, p.scratch, /*n_x=*/1, p.y, p.rows,
                                /*bias=*/nullptr, /*add=*/false},
                               0, p.rows);
}

}  // namespace bf16
}  // namespace
