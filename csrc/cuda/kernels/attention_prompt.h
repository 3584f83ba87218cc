// Parameters of attention over many queries, shared by launchers and kernels. Built-in types only
// (tensor_map.h).
#pragma once

#include "cuda/kernels/tensor_map.h"

namespace qvl::cuda {

constexpr int kAttentionTile = 128;  // queries per tile: kQueryTile of ops.h

// The portable kernels, from sm_80 on (before, they are plain loops without shared memory): a block of 4
// warps processes half a tile of queries. If heads are padded to more than 128 values, a tile of keys has 32
// keys instead of 64. Shared memory of a block: queries, two tiles of keys and two of values, in rows of
// kPaddedDim + 8 values; offsets of a tile's keys and of their scales, 8 bytes each. On sm_86, sm_89 and
// sm_120 a block may have 99 KiB, all of which the rows of 256 + 8 values need: with more than 128 values,
// both offsets of key i are in row i of the queries, in its last 8 values, which nothing else uses.
constexpr int kAttentionThreads = 128, kAttentionQueries = 64;
template <int kPaddedDim>
constexpr int kAttentionKeys = kPaddedDim <= 128 ? 64 : 32;
template <int kPaddedDim>
constexpr bool kOffsetsInRows = kPaddedDim > 128;
template <int kPaddedDim>
constexpr int kAttentionRowBytes = (kAttentionQueries + 4 * kAttentionKeys<kPaddedDim>)*(kPaddedDim + 8) * 2;
template <int kPaddedDim>
constexpr int kAttentionShared =
    kAttentionRowBytes<kPaddedDim> + (kOffsetsInRows<kPaddedDim> ? 0 : kAttentionKeys<kPaddedDim> * 16);
static_assert(kAttentionShared<128> <= 99 << 10 && kAttentionShared<256> <= 99 << 10,
              "a block has at most 99 KiB of shared memory on sm_86, sm_89 and sm_120");

// The Hopper kernels: two warpgroups with 64 queries each; a third loads keys and values. Shared memory:
// queries, two tiles of 128 keys and two of values, with head_dim padded to a multiple of 64 values; offsets
// of 128 keys and of their scales; 128 bytes for barriers; 1024 bytes for alignment.
constexpr int kHopperThreads = 384, kHopperKeys = 128;
template <int kPaddedDim>
constexpr int kHopperShared =
    5 * kHopperKeys * ((kPaddedDim + 63) / 64 * 128) + kHopperKeys * 16 + 128 + 1024;

// Types of cached keys and values. kHalfKeys: the compute type; kBfloat16Keys and kFloat16Keys stand only for
// the 16-bit type that is not the compute type.
constexpr int kHalfKeys = 0, kBfloat16Keys = 1, kFloat16Keys = 2, kFloatKeys = 3, kInt8Keys = 4;

// Parameters of attention_prompt.cu, see attention_prompt() and KvLayer in ops.h.
struct PagedAttention {
  const void* q;
  void* y;
  const int* chunks;  // PromptChunk of ops.h: first, n, past, table
  const int* tiles;   // Tile of ops.h: chunk, offset
  const int* blocks;
  const char* base;
  unsigned long long block_bytes;
  int max_blocks, block_tokens, type, heads, head_dim;
  // Hopper: keys and values, [blocks][2 * heads][block_tokens][head_dim], in boxes of 64 values of all tokens
  // of a block.
  TensorMap keys;
  int use_tensor_map;  // whether `keys` is used; if not, threads copy
};

// Parameters of attention_dense.cu, see DenseAttention in ops.h; strides are in values.
struct DenseParams {
  const void *q, *k, *v;
  void* y;
  long long q_image, q_stride, q_head;
  long long kv_image, kv_stride, kv_head;
  int n_queries, n_keys, heads, head_dim;
  float scale;
  // Hopper: keys and values, [images][heads][n_keys][head_dim] each, in boxes of 64 values of 128 keys.
  TensorMap keys[2];
  int use_tensor_map;  // whether `keys` is used; if not, threads copy
};

}  // namespace qvl::cuda
