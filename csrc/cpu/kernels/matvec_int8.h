// Matrix-vector product with int8 weights and one float32 scale per row: y[n][row] = scale[row] * sum over k
// of w[row][k] * x[n][k], x quantized to 8 bits (quantized_x.h).
//
// Layout:
//
//   values  [rows][k padded to 128]  int8, padded with zeros
//   scales  [rows]                   float32, after all values
//
//   a block of kBlock = 32 L columns (128, 256 or 512; L = kLanes), for one row of W and one row of x:
//
//   weights   | 4L bytes | 4L bytes | .. 8 vectors      lane l adds 4 products per vector, 32 per block,
//   x         | 4L bytes | 4L bytes | .. 8 vectors      as int32: dots[l]
//   x scales  | L float32 |                             sums[l] += float(dots[l]) * x_scale[l]
//
// The instructions multiply unsigned bytes by signed ones. In the ISA avx2 (kSignedProducts) the signs
// of the weights are moved to x: |w| * (sign(w) * x). Elsewhere 128 is added to the weights, and dots start
// at -128 times the sum of x (quantized_x.h).
//
// Cost. Bytes: (k + 4) * rows, once for all rows of x. Operations: 2 * rows * k * n_x on integers, 64
// products per instruction with AVX-512 VNNI, 32 per five instructions with AVX2. 2 * n_x operations per
// byte: memory-bound for one row of x. time = max((k + 4) * rows / bandwidth, 2 * rows * k * n_x / integer
// rate).
//
// Reference: reference::linear with the same rounding of activations (rounded_activations), and within 3 %
// without rounding, tests/csrc/test_kernels.py::test_linear.
#pragma once

#include "cpu/kernels/quantized_x.h"

namespace {

using Int8X = QuantizedX<kBlock>;

size_t prepared_bytes_int8(int k, int n_x) {
  return static_cast<size_t>(Int8X::row_bytes(k) * n_x);
}

void prepare_int8(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  prepare_quantized<kBlock>(x, x_stride, n_x, k, /*offset=*/128, prepared, [](const float* from, float* to) {
    __builtin_memcpy(to, from, kBlock * sizeof(float));
  });
}

// `Rows` for int8 weights; matvec.h documents the members.
struct RowsInt8 {
  static constexpr int kColumnBlock = 2048;
  static constexpr int kXAtOnce = 4;
  static constexpr int rows_at_once(int n) { return (n == 1 ? 4 : 2) * (kLanes == 16 ? 2 : 1); }
  static QVL_INLINE int64_t row_bytes(int k) { return round_up(k, kUnit); }
  static constexpr bool kHasScale = true;

  template <int RowCount, int XCount, int Pass, int Passes, int SumStride>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end,
                             WeightPrefetcher& prefetcher, Floats* sums) {
    for (; end - first >= kBlock; first += kBlock) {
      add_block<RowCount, XCount, Pass, Passes, SumStride, kBlock>(p, row, first_x, first, kBlock, prefetcher,
                                                                   sums);
    }
    if (first < end) {
      const int remaining = round_up(end - first, kUnit);
      add_block<RowCount, XCount, Pass, Passes, SumStride, 0>(p, row, first_x, first, remaining, prefetcher,
                                                              sums);
    }
  }

  // Add the products of n_k columns. StaticColumns: n_k if it is a compile-time constant, else 0.
  template <int RowCount, int XCount, int Pass, int Passes, int SumStride, int StaticColumns>
  static QVL_INLINE void add_block(const Matvec& p, int64_t row, int first_x, int first, int n_k,
                                   WeightPrefetcher& prefetcher, Floats* sums) {
    const int64_t stride = row_bytes(p.k);
    const uint8_t* w[RowCount];
    const char* x[XCount];
    Ints dots[RowCount][XCount];
#pragma GCC unroll 8
    for (int r = 0; r < RowCount; ++r) {
      w[r] = static_cast<const uint8_t*>(p.weights) + (row + r) * stride + first;
      keep(w[r]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < XCount; ++n) {
      x[n] = Int8X::block(p, first_x + n, first);
      keep(x[n]);
#pragma GCC unroll 8
      for (int r = 0; r < RowCount; ++r) {
        dots[r][n] = kSignedProducts ? Ints{} : load<Ints>(x[n] + sizeof(Floats));
      }
    }
    if constexpr (StaticColumns != 0) {
#pragma GCC unroll 8
      for (int i = 0; i < StaticColumns; i += kVector)
        step<RowCount, XCount, Pass, Passes>(w, x, i, prefetcher, dots);
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < n_k; i += kVector) step<RowCount, XCount, Pass, Passes>(w, x, i, prefetcher, dots);
    }
    add_scaled<RowCount, XCount, SumStride>(dots, x, first == 0, sums);
  }

  template <int RowCount, int XCount, int Pass, int Passes>
  static QVL_INLINE void step(const uint8_t* const (&w)[RowCount], const char* const (&x)[XCount], int i,
                              WeightPrefetcher& prefetcher, Ints (&dots)[RowCount][XCount]) {
    SignedBytes v[RowCount];
#pragma GCC unroll 8
    for (int r = 0; r < RowCount; ++r) {
      v[r] = load<SignedBytes>(w[r] + i);
      if (r % Passes == Pass && i % 64 == 0) prefetcher.next();
    }
#pragma GCC unroll 8
    for (int n = 0; n < XCount; ++n) {
      const SignedBytes a = load<SignedBytes>(x[n] + Int8X::kValues + i);
#pragma GCC unroll 8
      for (int r = 0; r < RowCount; ++r) {
        if constexpr (kSignedProducts) {
          dots[r][n] = multiply_add_signed(dots[r][n], v[r], a);
        } else {
          dots[r][n] = multiply_add(dots[r][n], reinterpret_cast<UnsignedBytes>(v[r]) ^ uint8_t{128}, a);
        }
      }
    }
  }
};

}  // namespace
