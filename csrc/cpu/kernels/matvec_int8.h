// int8 weights [rows][k padded to 128] with a float32 scale for each row.
#pragma once

#include "cpu/kernels/quantised_x.h"

namespace {

using Int8X = QuantisedX<kBlock>;

size_t prepared_bytes_int8(int k, int n_x) {
  return static_cast<size_t>(Int8X::row_bytes(k) * n_x);
}

void prepare_int8(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  prepare_quantised<kBlock>(x, x_stride, n_x, k, 128, prepared, [](const float* from, float* to) {
    __builtin_memcpy(to, from, kBlock * sizeof(float));
  });
}

struct RowsInt8 {
  static constexpr int kCut = 2048;
  static constexpr int kGroup = 4;
  static constexpr int rows_at_once(int n) { return (n == 1 ? 4 : 2) * (kLanes == 16 ? 2 : 1); }
  static QVL_INLINE int64_t row_bytes(int k) { return round_up(k, kUnit); }
  static constexpr bool kScaled = true;

  template <int R, int N, int Turn, int Turns, int Stride>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end, NextLines& ahead,
                             Floats* sums) {
    for (; end - first >= kBlock; first += kBlock) {
      add_block<R, N, Turn, Turns, Stride, kBlock>(p, row, first_x, first, kBlock, ahead, sums);
    }
    if (first < end) {
      const int rest = round_up(end - first, kUnit);
      add_block<R, N, Turn, Turns, Stride, 0>(p, row, first_x, first, rest, ahead, sums);
    }
  }

  // n_k columns, which are Whole if that is not 0.
  template <int R, int N, int Turn, int Turns, int Stride, int Whole>
  static QVL_INLINE void add_block(const Matvec& p, int64_t row, int first_x, int first, int n_k,
                                   NextLines& ahead, Floats* sums) {
    const int64_t stride = row_bytes(p.k);
    const uint8_t* w[R];
    const char* x[N];
    Ints dots[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      w[r] = static_cast<const uint8_t*>(p.weights) + (row + r) * stride + first;
      keep(w[r]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      x[n] = Int8X::block(p, first_x + n, first);
      keep(x[n]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        dots[r][n] = kSignedProducts ? Ints{} : load<Ints>(x[n] + sizeof(Floats));
      }
    }
    if constexpr (Whole != 0) {
#pragma GCC unroll 8
      for (int i = 0; i < Whole; i += kVector) step<R, N, Turn, Turns>(w, x, i, ahead, dots);
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < n_k; i += kVector) step<R, N, Turn, Turns>(w, x, i, ahead, dots);
    }
    add_scaled<R, N, Stride>(dots, x, first == 0, sums);
  }

  template <int R, int N, int Turn, int Turns>
  static QVL_INLINE void step(const uint8_t* const (&w)[R], const char* const (&x)[N], int i,
                              NextLines& ahead, Ints (&dots)[R][N]) {
    SignedBytes v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      v[r] = load<SignedBytes>(w[r] + i);
      if (r % Turns == Turn && i % 64 == 0) ahead.ask();
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const SignedBytes a = load<SignedBytes>(x[n] + Int8X::kValues + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
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
