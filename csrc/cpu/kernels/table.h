// The kernels as a table of functions, one table per ISA (dispatch.h).
//
// Kernels are single-threaded; the callers distribute the work. Row indices of a matrix, strides and lengths
// of elementwise operations are int64_t; sizes within a row, a tile or a panel are int.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qwenvl.h"

namespace qvl::cpu {

constexpr int kMaxRows = 8;      // maximum number of rows of x of a matrix-vector kernel
constexpr int kMaxKvTile = 256;  // maximum number of tokens of a KvTile
constexpr int kMaxTileK = 512;   // maximum number of columns of an unpacked tile in bfloat16; float32: half

// y[r * y_stride + row] (+)= sum over k of weight[row][k] * x[r][k] + bias[row] for r < n_x and the rows that
// are given to matvec().
struct Matvec {
  const void* weights;
  // int8: float [rows]; int4: bfloat16 [rows][groups of a row padded to 128 values]; types with zero points:
  // float16 in the shape of int4's.
  const void* scales;
  int k;          // values in a row
  const void* x;  // activations, converted by prepare_x
  int n_x;        // rows of x, 1 to kMaxRows
  float* y;
  int64_t y_stride;
  const float* bias;  // may be NULL
  bool add;           // add to y instead of overwriting it
  const void* zeros;  // types with zero points only: float16, in the shape of `scales`
};

// Tile of weights to unpack for the blocked product, to float32 (unpack_tile[0]) or bfloat16
// (unpack_tile[1]). The scale of an int8 row is not applied. With an odd n_k a column is added, which has no
// effect on the product.
struct UnpackTile {
  const void* weights;
  const void* scales;
  int k;
  int64_t first_row, n_rows;
  int first_k, n_k;   // first_k of quantized types: a multiple of kPackUnit (core/pack.h)
  void* tile;         // [n_rows][n_k rounded up to 2], in memory for a tile of the maximum width (unpack.h)
  const void* zeros;  // as in Matvec
};

// Memory to prefetch: `rows` rows of row_bytes bytes.
struct PrefetchRange {
  const char* first;
  int64_t stride;  // bytes from row to row
  int64_t rows;
  int64_t row_bytes;
};

// Keys and values of up to kMaxKvTile tokens of one head, referenced in place.
struct KvTile {
  const void* keys;
  const void* values;
  int64_t stride;           // elements from token to token
  qvl_dtype dtype;          // float32, bfloat16, float16 or int8
  int n;                    // number of tokens
  const float* key_scales;  // int8: one scale per token
  const float* value_scales;
};

struct Kernels {
  qvl_isa isa;
  int lanes;      // floats in a vector
  bool bf16_dot;  // attend_rounded is not NULL, and blocked products of weights other than float32 run in
                  // bfloat16, with index 1 of pack_panel, unpack_tile and multiply_tile

  // norm.h: x [n] -> y [n]; y may be the same memory as x.
  void (*rms_norm)(const float* x, const float* weight, int n, float epsilon, float* y);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float epsilon, float* y);

  // elementwise.h
  void (*gelu)(float* x, int64_t n);                          // with erf, in place
  void (*silu_mul)(const float* gate, float* x, int64_t n);   // x *= silu(gate)
  void (*add)(const float* from, float* to, int64_t n);       // to += from
  void (*widen)(const uint16_t* from, float* to, int64_t n);  // bfloat16 -> float32
  void (*widen_float16)(const uint16_t* from, float* to, int64_t n);
  void (*narrow)(const float* from, uint16_t* to, int64_t n);          // float32 -> bfloat16
  void (*narrow_float16)(const float* from, uint16_t* to, int64_t n);  // clamps to the range of float16
  float (*narrow_int8)(const float* from, int8_t* to, int64_t n);      // returns the scale
  // x [head_dim] rotated by cos, sin [head_dim / 2], times scale
  void (*rotate)(float* x, const float* cos, const float* sin, int head_dim, float scale);

  // matvec_*.h. prepare_x: convert activations x [n_x][k], with rows x_stride apart, to the form that matvec
  // reads; it has prepared_bytes() bytes.
  size_t (*prepared_bytes[QVL_DTYPES])(int k, int n_x);
  void (*prepare_x[QVL_DTYPES])(const float* x, int64_t x_stride, int n_x, int k, void* prepared);
  void (*matvec[QVL_DTYPES])(const Matvec& product, int64_t first_row, int64_t end_row);

  // gemm.h: pack activations in panels of `lanes` tokens; a panel is [k][lanes] float32 or, for bfloat16,
  // [k / 2][lanes][2]. Index 1 is bfloat16, used with unpack_tile of the same index.
  void (*pack_panel[2])(const float* x, int64_t x_stride, int n_tokens, int k, void* panel);
  void (*unpack_tile[2][QVL_DTYPES])(const UnpackTile& tile);
  // Add the product of n_k columns of tile [rows][width] and panels [n_panels], panel_bytes apart, to c
  // [rows][c_stride]; `assign`: overwrite c. Prefetches next_tile.
  void (*multiply_tile[2])(const void* tile, int64_t width, int rows, int n_k, const void* panels,
                           size_t panel_bytes, int n_panels, bool assign, float* c, int64_t c_stride,
                           const PrefetchRange& next_tile);
  // y [n_x][y_stride] = c^T * scales + bias, or with `add` y += this, for c [rows][c_stride], whose stride is
  // a multiple of `lanes`. scales and bias may be NULL.
  void (*write_block)(const float* c, int64_t c_stride, int64_t rows, int64_t n_x, const float* scales,
                      const float* bias, bool add, float* y, int64_t y_stride);

  // attention.h: softmax(q . k) v of one head, tile by tile; the caller has scaled q. state [n_q][2]: running
  // maximum and running sum of each query. out [n_q][out_stride]: weighted sum of values, which attend_end
  // divides by the running sum; out_stride is head_dim rounded up to `lanes`. attend_begin initialises state
  // and out.
  void (*attend_begin)(int n_q, int64_t out_stride, float* state, float* out);
  size_t (*attend_scratch_bytes)(int head_dim, int n_q, int n_tokens);
  // Add one tile for n_q queries. Query i, at q + i * q_stride, sees the tile's first min(visible + i,
  // tile.n) tokens.
  void (*attend)(const float* q, int64_t q_stride, int n_q, int head_dim, const KvTile& tile, int64_t visible,
                 float* state, float* out, int64_t out_stride, void* scratch);
  // As attend, with the factors of products rounded to bfloat16; NULL without bf16_dot.
  void (*attend_rounded)(const float* q, int64_t q_stride, int n_q, int head_dim, const KvTile& tile,
                         int64_t visible, float* state, float* out, int64_t out_stride, void* scratch);
  // Add n_tiles tiles, with at most kMaxKvTile tokens in total, for one query, which sees all their tokens;
  // reads keys and values in place.
  void (*attend_one)(const float* q, int head_dim, const KvTile* tiles, int n_tiles, float* state,
                     float* out);
  // Merge the partial result of other tiles, from_state and from, into state and out [out_stride] of one
  // query.
  void (*attend_merge)(const float* from_state, const float* from, int64_t out_stride, float* state,
                       float* out);
  void (*attend_end)(const float* state, int n_q, int64_t out_stride, float* out);
};

const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace qvl::cpu
