// The pieces of the blocked product (cpu/linear.cc): c^T = weights x activations^T.
//
// Tokens are the vector: a panel holds a vector's worth of them, and a weight is broadcast against it. So
// weights are read as they lie in memory, [out, in], and only the activations, far fewer, are rearranged.
#pragma once

#include "cpu/kernels/quantised_x.h"

namespace {

using qvl::cpu::kMaxTileK;
using qvl::cpu::UnpackTile;

void pack_panel_f32(const float* x, int64_t x_stride, int n_tokens, int k, void* panel) {
  auto* to = static_cast<float*>(panel);
  for (int i = 0; i < k; ++i) {
    for (int t = 0; t < kLanes; ++t) to[i * kLanes + t] = t < n_tokens ? x[t * x_stride + i] : 0.0F;
  }
}

void pack_panel_bf16(const float* x, int64_t x_stride, int n_tokens, int k, void* panel) {
  auto* to = static_cast<uint32_t*>(panel);
  for (int i = 0; i < k; i += 2, to += kLanes) {
    Floats low{}, high{};
    for (int t = 0; t < n_tokens; ++t) {
      low[t] = x[t * x_stride + i];
      high[t] = i + 1 < k ? x[t * x_stride + i + 1] : 0.0F;
    }
    const Words pairs = widen_halves(narrow(low)) | widen_halves(narrow(high)) << 16;
    store(to, pairs);
  }
}

// Unpacking: each writes one row, `n` values from column `first` on, as float32.
struct UnpackF32 {
  static QVL_INLINE void row(const UnpackTile& t, int64_t row, float* to) {
    const float* from = static_cast<const float*>(t.weights) + row * t.k + t.first_k;
    __builtin_memcpy(to, from, static_cast<size_t>(t.n_k) * sizeof(float));
  }
};

struct UnpackBf16 {
  static QVL_INLINE void row(const UnpackTile& t, int64_t row, float* to) {
    const uint16_t* from = static_cast<const uint16_t*>(t.weights) + row * t.k + t.first_k;
    int i = 0;
    for (; i + kLanes <= t.n_k; i += kLanes) store(to + i, widen(load<HalfWords>(from + i)));
    for (; i < t.n_k; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      __builtin_memcpy(to + i, &bits, sizeof bits);
    }
  }
};

// Quantised rows are padded to 128 and first_k is a multiple of it, so whole vectors may be read; the tile
// has room for them (n_k rounded up to 128).
struct UnpackInt8 {
  static QVL_INLINE void row(const UnpackTile& t, int64_t row, float* to) {
    const int8_t* from = static_cast<const int8_t*>(t.weights) + row * round_up(t.k, kUnit) + t.first_k;
    for (int i = 0; i < t.n_k; i += kLanes) {
      store(to + i, to_floats(widen_few(load<FewBytes>(from + i))));
    }
  }
};

template <int Group>
struct UnpackInt4 {
  static QVL_INLINE void row(const UnpackTile& t, int64_t row, float* to) {
    const int width = round_up(t.k, kUnit);
    const uint8_t* from = static_cast<const uint8_t*>(t.weights) + (row * width + t.first_k) / 2;
    const uint16_t* scales = static_cast<const uint16_t*>(t.scales) + (row * width + t.first_k) / Group;
    for (int i = 0; i < t.n_k; i += kUnit, from += kUnit / 2, scales += kUnit / Group) {
      for (int j = 0; j < 4; ++j) {
        const uint32_t bits = static_cast<uint32_t>(scales[32 * j / Group]) << 16;
        float scale;
        __builtin_memcpy(&scale, &bits, sizeof scale);
        for (int part = 0; part < 32; part += kLanes) {
          const HalfWords words = load<HalfWords>(from + 2 * part);
          const Ints nibbles = reinterpret_cast<Ints>(widen_halves(words >> (4 * j) & 15)) - 8;
          store(to + i + 32 * j + part, to_floats(nibbles) * scale);
        }
      }
    }
  }
};

// While a row is unpacked, the same row's part of the next tile is asked for.
QVL_INLINE void prefetch_next(const UnpackTile& t, int64_t row) {
  const int64_t row_bytes = int64_t{t.weight_bits} * t.k / 8;
  const int64_t start = int64_t{t.weight_bits} * (t.first_k + t.n_k) / 8;
  const int64_t bytes = int64_t{t.weight_bits} * t.n_k / 8;
  if (t.first_k + t.n_k < t.k)
    prefetch_all(static_cast<const char*>(t.weights) + row * row_bytes + start, bytes);
}

template <typename Unpack>
void unpack_to_f32(const UnpackTile& t) {
  const int width = round_up(t.n_k, 2);
  float line[kMaxTileK + kUnit];
  for (int64_t r = 0; r < t.n_rows; ++r) {
    prefetch_next(t, t.first_row + r);
    Unpack::row(t, t.first_row + r, line);
    line[t.n_k] = 0.0F;
    __builtin_memcpy(static_cast<float*>(t.tile) + r * width, line,
                     static_cast<size_t>(width) * sizeof(float));
  }
}

template <typename Unpack>
void unpack_to_bf16(const UnpackTile& t) {
  const int width = round_up(t.n_k, 2);
  float line[kMaxTileK + kUnit];
  for (int64_t r = 0; r < t.n_rows; ++r) {
    prefetch_next(t, t.first_row + r);
    Unpack::row(t, t.first_row + r, line);
    line[t.n_k] = 0.0F;
    uint16_t* to = static_cast<uint16_t*>(t.tile) + r * width;
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) store(to + i, narrow(load<Floats>(line + i)));
    if (i < width) {
      const HalfWords rest = narrow(load_some(line + i, width - i));
      __builtin_memcpy(to + i, &rest, static_cast<size_t>(width - i) * 2);
    }
  }
}

// One step of R rows and P panels along k: for float32 one value, for bfloat16 a pair.
struct StepF32 {
  typedef float Element;
  static constexpr int kPerStep = 1;
  static QVL_INLINE Floats accumulate(Floats sum, const float* weight, Floats x) { return sum + *weight * x; }
};

#if defined(__AVX512BF16__)
// bfloat16 as it is.
void copy_bf16(const UnpackTile& t) {
  const int width = round_up(t.n_k, 2);
  for (int64_t r = 0; r < t.n_rows; ++r) {
    prefetch_next(t, t.first_row + r);
    const uint16_t* from = static_cast<const uint16_t*>(t.weights) + (t.first_row + r) * t.k + t.first_k;
    uint16_t* to = static_cast<uint16_t*>(t.tile) + r * width;
    __builtin_memcpy(to, from, static_cast<size_t>(t.n_k) * 2);
    if (width > t.n_k) to[t.n_k] = 0;
  }
}

struct StepBf16 {
  typedef uint16_t Element;
  static constexpr int kPerStep = 2;
  static QVL_INLINE Floats accumulate(Floats sum, const uint16_t* weights, Floats x) {
    int pair;
    __builtin_memcpy(&pair, weights, sizeof pair);
    const __m512i both = _mm512_set1_epi32(pair);
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(both), reinterpret_cast<__m512bh>(x)));
  }
};
#endif

template <typename Step, int R, int P>
QVL_INLINE void multiply_block(const typename Step::Element* tile, int64_t width, int n_steps,
                               const char* panels, size_t panel_bytes, bool first, float* c,
                               int64_t c_stride) {
  Floats sums[R][P];
  for (int r = 0; r < R; ++r) {
    for (int q = 0; q < P; ++q) sums[r][q] = first ? Floats{} : load<Floats>(c + r * c_stride + q * kLanes);
  }
  for (int s = 0; s < n_steps; ++s) {
    Floats x[P];
    for (int q = 0; q < P; ++q) x[q] = load<Floats>(panels + q * panel_bytes + s * sizeof(Floats));
    for (int r = 0; r < R; ++r) {
      const typename Step::Element* weight = tile + r * width + s * Step::kPerStep;
      for (int q = 0; q < P; ++q) sums[r][q] = Step::accumulate(sums[r][q], weight, x[q]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int q = 0; q < P; ++q) store(c + r * c_stride + q * kLanes, sums[r][q]);
  }
}

// Rows and panels at once: as many sums as there are registers, less those for the panels and a weight.
constexpr int kBlockRows = kLanes == 16 ? 8 : 4;
constexpr int kBlockPanels = 3;

template <typename Step, int R>
QVL_INLINE void multiply_rows(const typename Step::Element* tile, int64_t width, int n_steps,
                              const char* panels, size_t panel_bytes, int n_panels, bool first, float* c,
                              int64_t c_stride) {
  int q = 0;
  while (q < n_panels) {
    const char* from = panels + static_cast<size_t>(q) * panel_bytes;
    float* to = c + q * kLanes;
    const int left = n_panels - q;
    if (left >= kBlockPanels && left != kBlockPanels + 1) {  // 4 left: 2 and 2
      multiply_block<Step, R, 3>(tile, width, n_steps, from, panel_bytes, first, to, c_stride);
      q += 3;
    } else if (left >= 2) {
      multiply_block<Step, R, 2>(tile, width, n_steps, from, panel_bytes, first, to, c_stride);
      q += 2;
    } else {
      multiply_block<Step, R, 1>(tile, width, n_steps, from, panel_bytes, first, to, c_stride);
      q += 1;
    }
  }
}

template <typename Step>
void multiply_tile(const void* tile, int64_t width, int rows, int n_k, const void* panels, size_t panel_bytes,
                   int n_panels, bool first, float* c, int64_t c_stride) {
  const int n_steps = (n_k + Step::kPerStep - 1) / Step::kPerStep;
  const auto* from = static_cast<const typename Step::Element*>(tile);
  const auto* x = static_cast<const char*>(panels);
  int r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) {
    multiply_rows<Step, kBlockRows>(from + r * width, width, n_steps, x, panel_bytes, n_panels, first,
                                    c + r * c_stride, c_stride);
  }
  for (; r < rows; ++r) {
    multiply_rows<Step, 1>(from + r * width, width, n_steps, x, panel_bytes, n_panels, first,
                           c + r * c_stride, c_stride);
  }
}

}  // namespace
