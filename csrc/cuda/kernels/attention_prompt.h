// Parameters of attention over many queries, shared by launchers and kernels. Plain types only.
#pragma once

namespace qvl::cuda {

constexpr int kAttentionTile = 64;  // queries a block: kQueryTile of ops.h
constexpr int kAttentionThreads = 128;

// Keys a tile: half as many of large heads, for a block must do with the 99 KB of sm_86.
template <int D>
constexpr int kAttentionKeys = D <= 128 ? 64 : 32;
// Shared memory of a block: queries, two tiles of keys and two of values, rows of D + 8 values.
template <int D>
constexpr int kAttentionShared = (kAttentionTile + 4 * kAttentionKeys<D>)*(D + 8) * 2;

constexpr int kHalfKeys = 0, kBfloat16Keys = 1, kFloat16Keys = 2, kFloatKeys = 3, kInt8Keys = 4;

// kHalfKeys: of the type computed in, whichever that is.
struct PagedAttention {
  const void* q;
  void* y;
  const int* pieces;  // Piece of ops.h: first, n, past, table
  const int* tiles;   // Tile of ops.h: piece, offset
  const int* blocks;
  const char* base;
  unsigned long long block_bytes;
  int max_blocks, block_tokens, type, heads, head_dim;
};

// Strides in values, as in DenseAttention of ops.h.
struct DenseParams {
  const void *q, *k, *v;
  void* y;
  long long q_image, q_stride, q_head;
  long long kv_image, kv_stride, kv_head;
  int n_queries, n_keys, heads, head_dim;
  float scale;
};

}  // namespace qvl::cuda
