// Multi-threaded attention over many heads and queries.
#pragma once

#include "cpu/context.h"

namespace qvl::cpu {

// Attention mask: the keys that a query sees.
enum Mask {
  kAllKeys,  // every query sees all keys
  kCausal,   // query i of n sees the first n_keys - n + i + 1 keys
  // As kCausal, for tokens that are computed as decode steps (Part::generated in core/passes.h): each query
  // is computed separately, in the summation order of a decode step.
  kDecode
};

// Work item: queries [first, first + n) of a batch, all of the same sequence or image.
struct Queries {
  int64_t first;
  int n;
  int64_t n_keys;  // number of keys that the last query sees
  Mask mask;
  const int32_t* blocks = nullptr;  // block table if the keys are in a pool
};

// Source of keys and values in tiles of tile_tokens tokens.
struct KeysAndValues {
  int tile_tokens;
  // Tile i of a head's keys and values, without tokens from queries.n_keys on.
  virtual KvTile tile(const Queries& queries, int head, int64_t i) const = 0;

 protected:
  ~KeysAndValues() = default;
};

struct AttentionShape {
  int heads;
  int head_dim;
  int64_t q_stride;    // floats of q from token to token
  int64_t q_head;      // floats of q from head to head
  int64_t out_stride;  // floats of the output from token to token; its heads are adjacent
  bool rounded;        // kAllKeys and kCausal multiply bfloat16 if the kernels can (bf16_dot)
};

// Compute out[row][head * head_dim ...] for all rows of `work`; q is already scaled. Either all items must
// have the mask kDecode, or none may have it. A row's result depends only on the mask and on its query, keys
// and values, bit for bit, not on the other items or the number of threads.
void attention(Context& context, const AttentionShape& shape, const float* q, const KeysAndValues& kv,
               const Queries* work, int64_t n_work, float* out);

// Maximum number of queries of a work item.
constexpr int kQueryTile = 256;

// Keys and values of an image in float32, token_stride values from token to token and head_stride from head
// to head.
struct DenseKv final : KeysAndValues {
  const float *keys, *values;
  int64_t token_stride, head_stride;

  DenseKv(const float* keys, const float* values, int64_t token_stride, int64_t head_stride)
      : keys(keys), values(values), token_stride(token_stride), head_stride(head_stride) {
    tile_tokens = 128;
  }
  KvTile tile(const Queries& queries, int head, int64_t i) const override;
};

}  // namespace qvl::cpu
