#include "cpu/linear.h"

#include <algorithm>

#include "core/pack.h"

namespace qvl::cpu {
namespace {

constexpr int64_t kMatvecRows = 128;  // maximum number of weight rows in a task of decode()
// Maximum number of bytes of weights in a task of decode() with more than kMaxRows rows of x (but at least 16
// weight rows), so that the weights stay in the cache from one group of kMaxRows rows of x to the next.
constexpr int64_t kDecodeTaskBytes = 1 << 18;
constexpr int64_t kTileRows = 64;  // maximum number of weight rows in a task of the blocked product
// Tokens packed together: their panels have 393 KB per tile and stay in the L2 cache (gemm.h).
constexpr int64_t kMaxTokens = 384;

// Address `bytes` after `memory`.
const void* offset(const void* memory, uint64_t bytes) {
  return static_cast<const char*>(memory) + bytes;
}

// Activations [n_x][k] permuted to the matrix's column order.
const float* permuted(Context& context, const Matrix& m, const float* x, int64_t x_stride, int64_t n_x) {
  float* const to = context.permuted.get<float>(static_cast<size_t>(n_x * m.k));
  context.rows(n_x, m.k, [&](int64_t i, int) {
    for (int64_t j = 0; j < m.k; ++j) to[i * m.k + j] = x[i * x_stride + m.order[j]];
  });
  return to;
}

// Product for decode rows, in groups of kMaxRows rows of x. A task is a range of weight rows for all groups:
// the first group reads these weights from memory, the other groups from the cache.
void decode(Context& context, const Matrix& m, const float* x, int64_t x_stride, int64_t n_x, float* y,
            int64_t y_stride, bool add) {
  const Kernels& kernels = context.kernels;
  const size_t group_bytes = kernels.prepared_bytes[m.dtype](m.k, kMaxRows);
  const int64_t groups = (n_x + kMaxRows - 1) / kMaxRows;
  char* prepared = context.activations.get<char>(group_bytes * static_cast<size_t>(groups));
  const auto product_of_group = [&](int64_t g) {
    return Matvec{m.values,
                  m.scales,
                  m.k,
                  prepared + group_bytes * static_cast<size_t>(g),
                  static_cast<int>(std::min<int64_t>(kMaxRows, n_x - g * kMaxRows)),
                  y + g * kMaxRows * y_stride,
                  y_stride,
                  m.bias,
                  add,
                  m.zeros};
  };
  // The last group, which may have a single row, does not count as work.
  context.run(groups, (groups - 1) * kMaxRows * kElementWork * m.k, [&](int64_t g, int) {
    const Matvec group = product_of_group(g);
    kernels.prepare_x[m.dtype](x + g * kMaxRows * x_stride, x_stride, group.n_x, m.k,
                               prepared + group_bytes * static_cast<size_t>(g));
  });
  // Rows of W per task: 32 to kMatvecRows in multiples of 32, for about 8 tasks per thread. With several
  // groups no more than cached_rows, a multiple of 16, because the weights of a task must stay in the cache.
  const int64_t equal_share = m.rows / (8 * context.pool.size()) / 32 * 32;
  const int64_t cached_rows = kDecodeTaskBytes / static_cast<int64_t>(value_bytes(m.dtype, 1, m.k)) / 16 * 16;
  const int64_t max_step = groups > 1 ? std::clamp<int64_t>(cached_rows, 16, kMatvecRows) : kMatvecRows;
  const int64_t step = std::clamp<int64_t>(equal_share, std::min<int64_t>(32, max_step), max_step);
  context.run((m.rows + step - 1) / step, m.rows * m.k * n_x, [&](int64_t task, int) {
    for (int64_t g = 0; g < groups; ++g) {
      kernels.matvec[m.dtype](product_of_group(g), task * step, std::min((task + 1) * step, m.rows));
    }
  });
}

// Memory of the tile that this thread probably reads next: the following columns, from k on, of the rows from
// `row` on, or after the last column the first columns of the following rows.
PrefetchRange next_tile(const Matrix& m, int64_t row, int k, int tile_k) {
  if (k >= m.k) {
    row += kTileRows;
    k = 0;
  }
  if (row >= m.rows) return {};
  const int64_t stride = static_cast<int64_t>(value_bytes(m.dtype, 1, m.k));
  const int64_t bits = value_bits(m.dtype);
  return {static_cast<const char*>(m.values) + row * stride + k * bits / 8, stride,
          std::min(kTileRows, m.rows - row), std::min(tile_k, m.k - k) * bits / 8};
}

// Weights in the form that multiply_tile reads.
struct Tile {
  const void* values;
  int64_t width;  // elements from row to row
};

// Unpack the tile, or use bfloat16 weights in place if they are multiplied as bfloat16 and n_k is even. kind:
// index of the kernels, 0 for float32 and 1 for bfloat16.
Tile tile_of(const Kernels& kernels, int kind, const Matrix& m, const UnpackTile& tile) {
  if (kind == 1 && m.dtype == QVL_BFLOAT16 && tile.n_k % 2 == 0) {
    return {static_cast<const uint16_t*>(m.values) + tile.first_row * m.k + tile.first_k, m.k};
  }
  kernels.unpack_tile[kind][m.dtype](tile);
  return {tile.tile, (tile.n_k + 1) / 2 * 2};
}

// Blocked product of up to kMaxTokens prompt rows.
void blocked(Context& context, const Matrix& m, const float* x, int64_t x_stride, int64_t n_x, float* y,
             int64_t y_stride, bool add) {
  const Kernels& kernels = context.kernels;
  const int kind = kernels.bf16_dot && m.dtype != QVL_FLOAT32 ? 1 : 0;
  // Divide the columns equally, in multiples of `unit`: for quantized types UnpackTile requires this, and a
  // panel of bfloat16 has pairs of columns.
  const int max_k = kind == 1 ? kMaxTileK : kMaxTileK / 2, unit = is_quantized(m.dtype) ? kPackUnit : 32;
  const int parts = (m.k + max_k - 1) / max_k;
  const int tile_k = ((m.k + parts - 1) / parts + unit - 1) / unit * unit;
  const int lanes = kernels.lanes;
  const auto n_panels = static_cast<int>((n_x + lanes - 1) / lanes);
  const int64_t k_even = (m.k + 1) / 2 * 2;
  const size_t k_bytes = static_cast<size_t>(lanes) * (kind == 1 ? 2 : 4);  // bytes of a panel per k
  const size_t panel_bytes = static_cast<size_t>(k_even) * k_bytes;
  char* panels = context.activations.get<char>(static_cast<size_t>(n_panels) * panel_bytes);
  context.rows(n_panels, int64_t{lanes} * m.k, [&](int64_t p, int) {
    const auto n = static_cast<int>(std::min<int64_t>(lanes, n_x - p * lanes));
    kernels.pack_panel[kind](x + p * lanes * x_stride, x_stride, n, m.k,
                             panels + static_cast<size_t>(p) * panel_bytes);
  });
  const int64_t c_stride = int64_t{n_panels} * lanes;
  const auto tile_floats = static_cast<size_t>(kTileRows * kMaxTileK / 2);
  const size_t c_floats = static_cast<size_t>(kTileRows * c_stride);
  // Allocate here, because tasks must not throw.
  for (Buffer& buffer : context.thread_scratch) buffer.get<float>(tile_floats + c_floats);
  const int64_t tasks = (m.rows + kTileRows - 1) / kTileRows;
  context.run(tasks, m.rows * m.k * n_x, [&](int64_t task, int thread) {
    float* tile = context.thread_scratch[static_cast<size_t>(thread)].get<float>(tile_floats + c_floats);
    float* c = tile + tile_floats;
    const int64_t first_row = task * kTileRows;
    const int64_t n_rows = std::min(kTileRows, m.rows - first_row);
    for (int k = 0; k < m.k; k += tile_k) {
      const int n_k = std::min(tile_k, m.k - k);
      const Tile unpacked =
          tile_of(kernels, kind, m, {m.values, m.scales, m.k, first_row, n_rows, k, n_k, tile, m.zeros});
      kernels.multiply_tile[kind](unpacked.values, unpacked.width, static_cast<int>(n_rows), n_k,
                                  panels + static_cast<size_t>(k) * k_bytes, panel_bytes, n_panels, k == 0, c,
                                  c_stride, next_tile(m, first_row, k + n_k, tile_k));
    }
    // The scales of int8, one per row, are applied to the sums; unpack_tile has applied the scales of groups.
    const float* scales = m.dtype == QVL_INT8 ? static_cast<const float*>(m.scales) + first_row : nullptr;
    const float* bias = m.bias != nullptr ? m.bias + first_row : nullptr;
    kernels.write_block(c, c_stride, n_rows, n_x, scales, bias, add, y + first_row, y_stride);
  });
}

}  // namespace

Matrix Matrix::stored(qvl_dtype dtype, int64_t rows, int64_t k, const void* data, const float* bias) {
  Matrix matrix;
  matrix.values = data;
  matrix.dtype = dtype;
  matrix.rows = rows;
  matrix.k = static_cast<int>(k);
  matrix.bias = bias;
  if (is_quantized(dtype)) matrix.scales = offset(data, value_bytes(dtype, rows, k));
  if (has_zeros(dtype)) matrix.zeros = offset(matrix.scales, scale_bytes(dtype, rows, k));
  return matrix;
}

Matrix Matrix::slice(int64_t first, int64_t n) const {
  Matrix part = *this;
  part.values = offset(values, first > 0 ? value_bytes(dtype, first, k) : 0);
  const uint64_t scales_before = first > 0 ? scale_bytes(dtype, first, k) : 0;
  if (scales != nullptr) part.scales = offset(scales, scales_before);
  if (zeros != nullptr) part.zeros = offset(zeros, scales_before);
  if (bias != nullptr) part.bias = bias + first;
  part.rows = n;
  return part;
}

void linear(Context& context, const Matrix& matrix, const float* x, int64_t x_stride, Rows rows, float* y,
            int64_t y_stride, bool add) {
  if (matrix.order != nullptr) {
    x = permuted(context, matrix, x, x_stride, rows.n());
    x_stride = matrix.k;
  }
  // The matrix-vector kernels of these types would round x to 8 bits (linear.h).
  if (context.exact && has_zeros(matrix.dtype)) rows = {rows.n(), 0};
  const int64_t n = rows.prompt;
  const int64_t parts = std::max<int64_t>(1, (n + kMaxTokens - 1) / kMaxTokens);
  const int64_t lanes = context.kernels.lanes;
  const int64_t step = ((n + parts - 1) / parts + lanes - 1) / lanes * lanes;
  for (int64_t first = 0; first < n; first += step) {
    blocked(context, matrix, x + first * x_stride, x_stride, std::min(step, n - first), y + first * y_stride,
            y_stride, add);
  }
  if (rows.decode > 0) {
    decode(context, matrix, x + n * x_stride, x_stride, rows.decode, y + n * y_stride, y_stride, add);
  }
}

}  // namespace qvl::cpu
