// Operations of the layers, of images and of sampling. The functions with a stream enqueue kernels and return
// without waiting for them; the others return sizes and types.
//
// H is the compute type, bfloat16 or float16 (Gpu::half). The GPU can access the memory of all pointers;
// matrices and the inputs of products are 16-byte aligned. A row begins where the previous one ends, unless a
// stride is given. The residual stream x is float32, inputs of products are H, products accumulate in
// float32.
//
// A row's result does not depend on the other rows or their number, bit for bit: see "Reproducibility" in
// qwenvl.h. Functions named *_decode process 1 to 256 rows: tokens of decode steps, and in linear_decode also
// the rows of lm_head. Those named *_prompt process 1 to thousands of rows: tokens of prompts, and in
// linear_prompt also rows of images. A row may be rounded differently by the two kinds of functions.
#pragma once

#include <cstdint>

#include "cuda/gpu.h"
#include "cuda/kernels/pick.h"

namespace qvl::cuda {

// Storage types of matrices on the GPU.
enum class Storage {
  kHalf,
  kInt8,
  kInt4G64,
  kInt4G128,
  kUint4G32,
  kUint4G64,
  kUint4G128,
  kUint8G32,
  kUint8G64
};
// A weight [out, in] on the GPU. `in` is padded with zeros to `stride` values: a multiple of 8 (kHalf) or of
// 128 (quantized).
struct Matrix {
  Storage storage;
  int out, in;
  int stride;
  void* values;                    // kHalf: H [out, stride]; quantized: layout of kernels/quantized.cuh
  void* scales;                    // quantized: layout of kernels/quantized.cuh; kHalf: NULL
  const float* bias;               // float32 [out], or NULL
  const int32_t* order = nullptr;  // [in]: column j of W multiplies x[order[j]]; NULL: x[j]
};

// Properties of a storage type.
struct StorageInfo {
  const char* name;  // part of kernel names
  int bits;          // per value
  int group;         // group size; 0: one scale per row (kInt8) or no scales (kHalf)
  bool zeros;        // whether each group has a zero point
};
constexpr StorageInfo kStorages[] = {
    // in the order of Storage
    {"half", 16, 0, false},       {"int8", 8, 0, false},      {"int4_g64", 4, 64, false},
    {"int4_g128", 4, 128, false}, {"uint4_g32", 4, 32, true}, {"uint4_g64", 4, 64, true},
    {"uint4_g128", 4, 128, true}, {"uint8_g32", 8, 32, true}, {"uint8_g64", 8, 64, true}};
constexpr const StorageInfo& info(Storage storage) {
  return kStorages[static_cast<int>(storage)];
}

// Epilogue of a product: activation, type and destination of the result. n: number of rows.
enum class Epilogue {
  kHalf,      // H [n, out]
  kFloat,     // float32 [n, out]
  kAdd,       // added to float32 [n, out]
  kGelu,      // H [n, out]; GELU with erf in linear_decode on GPUs other than Hopper, else by a polynomial
  kSiluTimes  // H [n, out / 2]: y = w1 x * silu(w2 x); the rows of w1 and w2 are interleaved in the matrix
};

// ---- weights: linear_decode.cc ------------------------------------------------------------------------

// Bytes of the values of a matrix on the GPU, and of its scales with the zero points.
struct MatrixBytes {
  uint64_t values, scales;
};
MatrixBytes matrix_bytes(Storage storage, int out, int in);

// Storage type on the GPU for the dtype of a matrix in a file.
Storage storage_of(qvl_dtype dtype);

// Convert the matrix `from`, in the layout of a file (qwenvl.h: qvl_packed_bytes), to the layout of the
// kernels. float32, bfloat16 and float16 become kHalf, rounded if necessary; quantized types keep their
// integers, scales and zero points. QVL_UINT8_G128 becomes kUint8G64, with each scale and zero point stored
// twice. `out`: rows of `from`; row r becomes row first + r * step of `to`, so that step 2 interleaves two
// matrices.
void upload_matrix(const Gpu&, CUstream, qvl_dtype dtype, const void* from, int out, const Matrix& to,
                   int first, int step);

// ---- decode steps: linear_decode.cc, attention_decode.cc, elementwise.cc --------------------------------

// y = x W^T + bias, x H [n, x_stride], x_stride a multiple of 8. The columns of x are already in the input
// order of the matrix (Matrix::order), see gather_columns. low_rank_next: the next kernel is low_rank_down
// (low_rank.h); on Hopper that kernel then starts only when x is complete, other GPUs ignore the argument.
void linear_decode(const Gpu&, CUstream, const Matrix&, const void* x, int64_t x_stride, int n, Epilogue,
                   void* y, bool low_rank_next = false);

// y[i, j] = x[i, order[j]] for j < in: x H [n, x_stride] -> H [n, y_stride]. Columns of y from `in` on are
// not written.
void gather_columns(const Gpu&, CUstream, const void* x, int64_t x_stride, const int32_t* order, int n,
                    int in, int64_t y_stride, void* y);

// y = x / rms(x) * weight, for each row: x float32 [n, width] -> H [n, width].
void rms_norm(const Gpu&, CUstream, const float* x, const float* weight, float epsilon, int n, int width,
              void* y);

// Look up rows of the embedding table, or of image features, as float32. ids int32 [n] (clamped to the
// vocabulary); features: NULL, or addresses [n] of float32 [width], 0 for rows that use their id.
void embed(const Gpu&, CUstream, const void* wte /* H [vocab, width] */, int vocab, int width,
           const int32_t* ids, const uint64_t* features, int n, float* x);

// Positions and block tables of the n rows (tokens) of a pass, in device memory.
struct RowMetadata {
  const int32_t* positions;     // [n]
  const int32_t* angle_tables;  // [n]: index of the table in Angles for the row's sequence
  const int32_t* tables;        // [n]: index of the row's sequence in `blocks`
  const int32_t* blocks;        // [sequences, max_blocks]: block tables
  int max_blocks;
};

// Rotary angles of all positions: cosines and sines, float32 [tables][max_positions][head_dim / 2] each, with
// a table for each rotary base; query scales [max_positions], the product of logn and 1 / sqrt(head_dim).
struct Angles {
  const float* cos;
  const float* sin;
  const float* query_scale;
  int max_positions;
};

// Keys and values of a layer. Block b begins at base + b * block_bytes and contains elements of type dtype,
// [2][heads][block_tokens][head_dim], keys first. QVL_INT8: the elements are integers, and float32 scales
// [2][heads][block_tokens] follow them (key or value = scale * integer).
struct KvLayer {
  char* base;
  uint64_t block_bytes;
  int block_tokens;  // 1 to 256
  qvl_dtype dtype;   // QVL_BFLOAT16, QVL_FLOAT16, QVL_FLOAT32, QVL_INT8
  int heads, head_dim;
};

// Rotate queries and keys (pairs d, d + head_dim / 2), scale the queries, write keys and values to the cache.
// qkv H [n, 3 * heads * head_dim] -> q H [n, heads * head_dim].
void rotate_and_store(const Gpu&, CUstream, const void* qkv, const RowMetadata&, const Angles&,
                      const KvLayer&, int n, void* q);

// Attention of the query of each row over the keys of its sequence: q H [n, heads * head_dim] -> H, the same
// shape. Row i has positions[i] + 1 keys, at most max_keys. Keys are split at multiples of a fixed number, so
// that a row's result does not depend on max_keys or n. scratch: the caller sets it to zero once after
// allocation; it then serves calls with any n and max_keys for which attention_decode_scratch() does not
// exceed its size.
uint64_t attention_decode_scratch(int n, int heads, int head_dim, int max_keys);
void attention_decode(const Gpu&, CUstream, const void* q, const RowMetadata&, const KvLayer&, int n,
                      int max_keys, void* scratch, void* y);

// rotate_and_store and attention_decode of a step in one call, with the same bits. q: scratch memory for the
// rotated queries. Each row is the newest token of a different sequence; the block table of row i is row i of
// metadata.blocks. The kernels read `metadata`, and the keys and values of earlier tokens, before the
// preceding kernels have ended. The writers of this data must therefore have ended before the first of a
// chain of early launches began, which the launch of a graph guarantees.
void attention_step(const Gpu&, CUstream, const void* qkv, const RowMetadata&, const Angles&, const KvLayer&,
                    int n, int max_keys, void* q, void* scratch, void* y);

// ---- prompts: linear_prompt.cc, attention_prompt.cc -----------------------------------------------------

// As linear_decode, without low_rank_next. scratch: memory of linear_prompt_scratch() bytes, which is 0
// unless the matrix is quantized (the dequantized matrix is then written there).
uint64_t linear_prompt_scratch(const Matrix&);
void linear_prompt(const Gpu&, CUstream, const Matrix&, const void* x, int64_t x_stride, int n, Epilogue,
                   void* y, void* scratch);

// Chunk of a prompt: rows first to first + n - 1 of q are the queries at positions past to past + n - 1 of a
// sequence; `table`: index of the sequence in `blocks`. A query attends to the keys up to its position.
struct PromptChunk {
  int first, n, past, table;
};
// Tile: up to kQueryTile queries of a chunk. Chunks and tiles are in device memory; n_tiles: the sum over the
// chunks of ceil(n / kQueryTile).
constexpr int kQueryTile = 128;
struct Tile {
  int chunk, offset;  // queries offset .. offset + kQueryTile - 1 of the chunk
};
// Attention of the tiles' queries: q H [rows, heads * head_dim] -> y H, the same shape.
void attention_prompt(const Gpu&, CUstream, const void* q, const PromptChunk* chunks, const Tile* tiles,
                      int n_tiles, const int32_t* blocks, int max_blocks, const KvLayer&, void* y);

// ---- images: vision.cc, convert.cc, attention_dense.cc --------------------------------------------------

// images float32 [n, 3, size, size] -> H [n * patches, stride]: a row contains the values of a patch,
// [3][patch][patch], padded with zeros. patch: side of a patch in pixels.
void cut_patches(const Gpu&, CUstream, const float* images, int n, int size, int patch, int stride, void* y);

// LayerNorm of the rows of x, float32 [n, width]. Outputs: y_half, H [n, width], and y_float, float32 [n,
// width]; one of them may be NULL, and y_float may be x. add: float32 [period, width] or NULL; its row
// i % period is added to row i of y_half, but not of y_float.
void layer_norm(const Gpu&, CUstream, const float* x, const float* weight, const float* bias, float epsilon,
                int n, int width, const float* add, int period, void* y_half, float* y_float);

// Row i of x += row i % period of `add`: x float32 [n, width], add float32 [period, width].
void add_rows(const Gpu&, CUstream, float* x, const float* add, int n, int width, int period);

// float32 [n] -> H [n].
void to_half(const Gpu&, CUstream, const float* x, int64_t n, void* y);

// Attention over all keys of an image. Query i of head h of image b begins at q + b * q_image + i * q_stride
// + h * q_head; strides are in values of H. Keys and values likewise, with kv_image, kv_stride and kv_head. q
// is multiplied by `scale`. y: H [images * n_queries, heads * head_dim]. head_dim: a multiple of 8, up to
// 128.
struct DenseAttention {
  const void *q, *k, *v;
  int64_t q_image, q_stride, q_head;
  int64_t kv_image, kv_stride, kv_head;
  int images, n_queries, n_keys, heads, head_dim;
  float scale;
};
void attention_dense(const Gpu&, CUstream, const DenseAttention&, void* y);

// ---- sampling: sample.cc --------------------------------------------------------------------------------

// Outputs of `sample`, in device memory.
struct SampleOutputs {
  int32_t* tokens;      // [n]; -1: the row has a NaN, a positive infinity or no finite logit
  float* logprobs;      // [n] or NULL
  int32_t n_top;        // number of most likely tokens per row to return, may be 0
  int32_t* top_tokens;  // [n, n_top]
  float* top_logprobs;  // [n, n_top]
};

// Bytes of scratch memory for `sample`.
uint64_t sample_scratch(int n, int vocab);

// Sampling as documented at qvl_sample and qvl_step. any_draw: at least one row is not greedy; any_changed:
// at least one row has token counts (for penalties) or forbidden ids. Kernels that no row needs are not
// launched.
void sample(const Gpu&, CUstream, const float* logits, int n, int vocab, const Pick* picks,
            const int32_t* forbidden, bool any_draw, bool any_changed, void* scratch, const SampleOutputs&);

}  // namespace qvl::cuda
