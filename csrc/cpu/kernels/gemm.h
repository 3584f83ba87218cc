// Blocked product for prompts and images, c [rows][tokens] = W x^T: the steps that cpu/linear.cc combines.
// Rows are those of W, the outputs of the layer; tokens are the rows of x. attention.h uses the steps, too,
// with queries or weights of attention in place of W, and keys or values in place of x.
//
// Layout, with L = kLanes. Vectors run along tokens: a panel contains L tokens, and weights are broadcast.
// Weights are thus read in memory order, [out, in], and only the activations, which are far smaller, are
// rearranged:
//
//   panel, float32     [k][L]           k = 0: x of token 0 1 .. L-1 | k = 1: .. |
//   panel, bfloat16    [k / 2][L][2]    a 32-bit lane contains values k and k + 1 of its token
//
//         tile of W                panels of x               c
//      [64 rows][n_k]          P panels of L tokens     R rows x P vectors in registers
//      +------------+          +------+------+------+     +------+------+------+
//    R |  -> k      |    x     |  |k  |      |      |  =  | sum  | sum  | sum  |   R x P = 8 x 3 (AVX-512),
//      +------------+          |  v   |      |      |     +------+------+------+   4 x 3 (AVX2, SSE)
//      |            |          +------+------+------+
//
// A step of R x P multiply-adds loads P vectors and broadcasts R weights. It uses R * P + P + 1 registers: 28
// of 32 with AVX-512, 16 of 16 with AVX2. Each element of c is a single sum over ascending k, so the result
// of a token has the same bits for any number of tokens.
//
// Cost. Operations: 2 * rows * k * tokens. Bytes: W once for up to 384 tokens (kMaxTokens of linear.cc), 384
// operations per byte in bfloat16; the panels of a tile, 384 x 512 bfloat16 or 384 x 256 float32 = 393 KB,
// stay in the L2 cache. Bound by the multiply-add units: 2 * L operations per instruction, 4 * L with
// bfloat16.
//
// Reference: reference::linear (reference/reference.cc), tests/csrc/test_kernels.py::test_linear; within 2e-5
// for float32 weights, within 2 % for other types, whose activations may be rounded to bfloat16.
#pragma once

#include "cpu/kernels/simd.h"
#include "cpu/kernels/table.h"

namespace {

using qvl::cpu::PrefetchRange;

// Pack up to kLanes tokens in a panel; the lanes of missing tokens are zero.
void pack_panel_f32(const float* x, int64_t x_stride, int n_tokens, int k, void* panel) {
  auto* to = static_cast<float*>(panel);
  for (int i = 0; i < k; i += kLanes) {
    const int count = k - i < kLanes ? k - i : kLanes;
    Words v[kLanes] = {};
    for (int t = 0; t < n_tokens; ++t)
      v[t] = reinterpret_cast<Words>(load_first(x + t * x_stride + i, count));
    transpose(v);
    for (int j = 0; j < count; ++j) store(to + int64_t{i + j} * kLanes, v[j]);
  }
}

// Pack up to kLanes tokens in a panel of bfloat16 pairs.
void pack_panel_bf16(const float* x, int64_t x_stride, int n_tokens, int k, void* panel) {
  auto* to = static_cast<uint32_t*>(panel);
  for (int i = 0; i < k; i += 2 * kLanes) {
    const int count = k - i < 2 * kLanes ? k - i : 2 * kLanes;
    Words pairs[kLanes] = {};
    for (int t = 0; t < n_tokens; ++t) {
      const float* from = x + t * x_stride + i;
      const HalfWords halves[2] = {
          narrow(load_first(from, count < kLanes ? count : kLanes)),
          count > kLanes ? narrow(load_first(from + kLanes, count - kLanes)) : HalfWords{}};
      pairs[t] = load<Words>(halves);
    }
    transpose(pairs);
    for (int j = 0; 2 * j < count; ++j) store(to + int64_t{i / 2 + j} * kLanes, pairs[j]);
  }
}

// Write a finished block of c, [rows][c_stride], to y [n_x][y_stride]: transpose it, multiply each row's
// values by the scale of the row (int8) and add the bias. add: add the result to y.
void write_block(const float* c, int64_t c_stride, int64_t rows, int64_t n_x, const float* scales,
                 const float* bias, bool add, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int count = rows - r < kLanes ? static_cast<int>(rows - r) : kLanes;
    const Floats scale = scales != nullptr ? load_first(scales + r, count) : broadcast(1);
    const Floats added = bias != nullptr ? load_first(bias + r, count) : Floats{};
    for (int64_t t = 0; t < n_x; t += kLanes) {
      Words v[kLanes] = {};
      for (int i = 0; i < count; ++i) v[i] = load<Words>(c + (r + i) * c_stride + t);
      transpose(v);
      for (int i = 0; i < kLanes && t + i < n_x; ++i) {
        float* to = y + (t + i) * y_stride + r;
        Floats value = reinterpret_cast<Floats>(v[i]) * scale + added;
        if (add) value += load_first(to, count);
        store_first(to, value, count);
      }
    }
  }
}

// A step along k of a register block (the R x P sums of the figure), with kPerStep values of k: one value in
// float32, a pair in bfloat16.
struct StepF32 {
  typedef float Element;
  static constexpr int kPerStep = 1;
  static QVL_INLINE Floats accumulate(Floats sum, const float* weight, Floats x) { return sum + *weight * x; }
};

#if defined(__AVX512BF16__)
struct StepBf16 {
  typedef uint16_t Element;
  static constexpr int kPerStep = 2;
  static QVL_INLINE Floats accumulate(Floats sum, const uint16_t* weights, Floats x) {
    int pair;
    __builtin_memcpy(&pair, weights, sizeof pair);
    const __m512i pairs = _mm512_set1_epi32(pair);
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(pairs), reinterpret_cast<__m512bh>(x)));
  }
};
#endif

// Multiply RowCount rows of the tile by PanelCount panels, with the sums in registers.
template <typename Step, int RowCount, int PanelCount>
QVL_INLINE void multiply_block(const typename Step::Element* tile, int64_t width, int n_steps,
                               const char* panels, size_t panel_bytes, bool assign, float* c,
                               int64_t c_stride) {
  Floats sums[RowCount][PanelCount];
  for (int r = 0; r < RowCount; ++r) {
    for (int p = 0; p < PanelCount; ++p)
      sums[r][p] = assign ? Floats{} : load<Floats>(c + r * c_stride + p * kLanes);
  }
  for (int s = 0; s < n_steps; ++s) {
    Floats x[PanelCount];
    for (int p = 0; p < PanelCount; ++p) x[p] = load<Floats>(panels + p * panel_bytes + s * sizeof(Floats));
    for (int r = 0; r < RowCount; ++r) {
      const typename Step::Element* weight = tile + r * width + s * Step::kPerStep;
      for (int p = 0; p < PanelCount; ++p) sums[r][p] = Step::accumulate(sums[r][p], weight, x[p]);
    }
  }
  for (int r = 0; r < RowCount; ++r) {
    for (int p = 0; p < PanelCount; ++p) store(c + r * c_stride + p * kLanes, sums[r][p]);
  }
}

// Maximum number of panels of a register block, and the number of rows for each number of panels. The sums
// fit in the registers that the panels and a weight leave free. With fewer panels a block has more rows:
// enough independent sums hide the latency of an addition.
constexpr int kBlockPanels = 3;
constexpr int block_rows(int panels) {
  return (panels == 3 ? 4 : panels == 2 ? 6 : 8) * (kLanes == 16 ? 2 : 1);
}

// Prefetches a range of memory during a product: some cache lines of 64 bytes with each register block of
// block_rows() rows, none with the smaller blocks of the remaining rows. `blocks` is an estimate of the
// number of register blocks of block_rows() rows. For a tile of 64 rows it is at most their number, so that
// the range is complete before the product ends, with many panels after about half of it. With the last tile
// of a matrix, of fewer rows, the range may remain incomplete.
class Prefetcher {
 public:
  Prefetcher(const PrefetchRange& range, int64_t blocks)
      : range_(range),
        row_lines_((range.row_bytes + 63) / 64),
        remaining_(range.rows * row_lines_),
        block_lines_((remaining_ + blocks - 1) / blocks) {}

  QVL_INLINE void next_block() {
    for (int64_t i = 0; i < block_lines_ && remaining_ > 0; ++i, --remaining_) {
      prefetch(range_.first + row_ * range_.stride + 64 * line_);
      if (++line_ == row_lines_) {
        line_ = 0;
        ++row_;
      }
    }
  }

 private:
  const PrefetchRange& range_;
  int64_t row_lines_;           // cache lines of a row
  int64_t remaining_;           // cache lines not prefetched yet
  int64_t block_lines_;         // cache lines to prefetch with each block
  int64_t row_ = 0, line_ = 0;  // next cache line
};

// Multiply all rows by PanelCount panels, which each block of rows reads again; for the tiles of linear.cc
// they have at most 49 KB together.
template <typename Step, int PanelCount>
QVL_INLINE void multiply_panels(const typename Step::Element* tile, int64_t width, int rows, int n_steps,
                                const char* panels, size_t panel_bytes, bool assign, float* c,
                                int64_t c_stride, Prefetcher& prefetcher) {
  constexpr int kBlockRows = block_rows(PanelCount), kFewerRows = block_rows(kBlockPanels);
  const auto block = [&](auto row_count, int r) {
    multiply_block<Step, row_count, PanelCount>(tile + r * width, width, n_steps, panels, panel_bytes, assign,
                                                c + r * c_stride, c_stride);
  };
  // Blocks of kBlockRows rows, for the remaining rows smaller blocks, and finally single rows.
  int r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) {
    prefetcher.next_block();
    block(std::integral_constant<int, kBlockRows>(), r);
  }
  for (; r + kFewerRows <= rows; r += kFewerRows) block(std::integral_constant<int, kFewerRows>(), r);
  for (; r < rows; ++r) block(std::integral_constant<int, 1>(), r);
}

template <typename Step>
void multiply_tile(const void* tile, int64_t width, int rows, int n_k, const void* panels, size_t panel_bytes,
                   int n_panels, bool assign, float* c, int64_t c_stride, const PrefetchRange& next_tile) {
  const int n_steps = (n_k + Step::kPerStep - 1) / Step::kPerStep;
  const auto* from = static_cast<const typename Step::Element*>(tile);
  Prefetcher prefetcher(next_tile,
                        int64_t{(rows + block_rows(1) - 1) / block_rows(1)} * (n_panels / kBlockPanels + 1));
  for (int p = 0; p < n_panels;) {
    const char* x = static_cast<const char*>(panels) + static_cast<size_t>(p) * panel_bytes;
    float* to = c + p * kLanes;
    // Three panels at a time, but the last four as two and two.
    const int remaining = n_panels - p;
    const int count = remaining >= kBlockPanels && remaining != kBlockPanels + 1 ? 3 : remaining >= 2 ? 2 : 1;
    if (count == 3) {
      multiply_panels<Step, 3>(from, width, rows, n_steps, x, panel_bytes, assign, to, c_stride, prefetcher);
    } else if (count == 2) {
      multiply_panels<Step, 2>(from, width, rows, n_steps, x, panel_bytes, assign, to, c_stride, prefetcher);
    } else {
      multiply_panels<Step, 1>(from, width, rows, n_steps, x, panel_bytes, assign, to, c_stride, prefetcher);
    }
    p += count;
  }
}

}  // namespace
