// int8 weights [rows][k padded to 128] with a float32 scale for each row.
#pragma once

#include "cpu/kernels/quantised_x.h"

namespace {

constexpr int kInt8Block = 256;  // activations that share a scale; the last block may be half

// Per activation row: float scales [blocks], then int16 values [padded].
struct Int8X {
  int padded, blocks;
  size_t bytes;

  explicit Int8X(int k) {
    padded = round_up(k, kUnit);
    blocks = (padded + kInt8Block - 1) / kInt8Block;
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
      const int first = b * kInt8Block;
      const int size = layout.padded - first < kInt8Block ? layout.padded - first : kInt8Block;
      const int given = k - first < size ? k - first : size;
      scales[b] = quantise_block(x + n * x_stride + (given > 0 ? first : 0), given, size, values + first);
    }
  }
}

struct RowsInt8 {
  template <int R, int N>
  static QVL_INLINE void run(const Matvec& p, int64_t row) {
    const Int8X layout(p.k);
    const int8_t* w = static_cast<const int8_t*>(p.weights) + row * layout.padded;
    const float* scales[N];
    const int16_t* x[N];
    for (int n = 0; n < N; ++n) {
      scales[n] = layout.scales(p.x, n);
      x[n] = layout.values(p.x, n);
    }
    Floats sums[R][N] = {};
    for (int b = 0; b < layout.blocks; ++b) {
      const int first = b * kInt8Block;
      const int end = first + kInt8Block < layout.padded ? first + kInt8Block : layout.padded;
      Ints dots[R][N] = {};
      for (int i = first; i < end; i += 2 * kLanes) {
        Shorts v[R];
        for (int r = 0; r < R; ++r) {
          v[r] = __builtin_convertvector(load<Bytes>(w + r * layout.padded + i), Shorts);
        }
        for (int n = 0; n < N; ++n) {
          const Shorts a = load<Shorts>(x[n] + i);
          for (int r = 0; r < R; ++r) dots[r][n] = multiply_add(dots[r][n], v[r], a);
        }
      }
      for (int n = 0; n < N; ++n) {
        for (int r = 0; r < R; ++r) sums[r][n] += to_floats(dots[r][n]) * scales[n][b];
      }
    }
    const auto* row_scales = static_cast<const float*>(p.scales) + row;
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) put(p, row + r, n, sum(sums[r][n]) * row_scales[r]);
    }
  }
};

}  // namespace
