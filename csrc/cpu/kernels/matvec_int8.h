// int8 weights [rows][k padded to 128] with a float32 scale for each row.
#pragma once

#include "cpu/kernels/quantised_x.h"

namespace {

// Per activation row: float scales [blocks], then int16 values [padded].
struct Int8X {
  int padded, blocks;
  size_t bytes;

  explicit Int8X(int k) {
    padded = round_up(k, kUnit);
    blocks = (padded + kBlock - 1) / kBlock;
    bytes = static_cast<size_t>(round_up(blocks * 4, 64)) + static_cast<size_t>(padded) * 2;
  }
  const float* scales(const void* x, int n) const {
    return reinterpret_cast<const float*>(static_cast<const char*>(x) + bytes * n);
  }
  const int16_t* values(const void* x, int n) const {
    return reinterpret_cast<const int16_t*>(static_cast<const char*>(x) + bytes * n +
                                            round_up(blocks * 4, 64));
  }
};

size_t prepared_bytes_int8(int k, int n_x) {
  return Int8X(k).bytes * n_x;
}

void prepare_int8(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  const Int8X layout(k);
  for (int n = 0; n < n_x; ++n) {
    auto* scales = const_cast<float*>(layout.scales(prepared, n));
    auto* values = const_cast<int16_t*>(layout.values(prepared, n));
    for (int b = 0; b < layout.blocks; ++b) {
      const int first = b * kBlock;
      const int size = layout.padded - first < kBlock ? layout.padded - first : kBlock;
      const int given = k - first < size ? k - first : size;
      scales[b] = quantise_block(x + n * x_stride + (given > 0 ? first : 0), given, size, values + first);
    }
  }
}

struct RowsInt8 {
  static constexpr int kCut = kBlock;
  static constexpr int kGroup = kLanes == 16 ? 4 : 2;
  static constexpr int rows_at_once(int n) { return n == 1 || kLanes == 16 ? 4 : 2; }
  static QVL_INLINE int64_t row_bytes(int k) { return round_up(k, kUnit); }
  static QVL_INLINE int64_t column_bytes(int n) { return n; }
  static QVL_INLINE float scale(const Matvec& p, int64_t row) {
    return static_cast<const float*>(p.scales)[row];
  }

  template <int R, int N, int Turn, int Turns>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end, int64_t ahead,
                             Floats (&sums)[R][N]) {
    const Int8X layout(p.k);
    const int64_t stride = layout.padded;
    const int8_t* w = static_cast<const int8_t*>(p.weights) + row * stride;
    const float* scales = layout.scales(p.x, first_x);
    const int16_t* x = layout.values(p.x, first_x);
    const int64_t x_stride = static_cast<int64_t>(layout.bytes / sizeof(int16_t));
    const int64_t scale_stride = static_cast<int64_t>(layout.bytes / sizeof(float));
    end = end < layout.padded ? round_up(end, kUnit) : layout.padded;
    for (int block = first; block < end; block += kBlock) {
      const int block_end = block + kBlock < end ? block + kBlock : end;
      Ints dots[R][N] = {};
      for (int i = block; i < block_end; i += 2 * kLanes) {
        Shorts v[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          v[r] = widen_bytes(load<Bytes>(w + r * stride + i));
          if (r % Turns == Turn && i % 64 == 0) prefetch(w + r * stride + i + ahead);
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          const Shorts a = load<Shorts>(x + n * x_stride + i);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) dots[r][n] = multiply_add(dots[r][n], v[r], a);
        }
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Floats x_scale = all(scales[n * scale_stride + block / kBlock]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][n] += to_floats(dots[r][n]) * x_scale;
      }
    }
  }
};

}  // namespace
