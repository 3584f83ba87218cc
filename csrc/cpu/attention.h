// Attention over many heads and queries, split among the threads.
#pragma once

#include "cpu/context.h"

namespace qvl::cpu {

enum Seen {
  kAllKeys,  // every query sees all keys
  kCausal,   // query i of n sees n_keys - n + i + 1
  kDecode    // as kCausal, but each query is computed by itself, in the order of a decode step
};

// Queries of one piece of work: n rows from the `first` of a packed batch on, all of one sequence or image.
struct Queries {
  int64_t first;
  int n;
  int64_t n_keys;  // tokens that the last of them sees
  Seen seen;
  const int32_t* blocks = nullptr;  // block table, where keys are in a pool
};

// Where a task's keys and values lie: tile `i` of a head, and how many tokens a tile has.
struct KeysAndValues {
  int tile_tokens;
  virtual KvTile tile(const Queries& queries, int head, int64_t i) const = 0;

 protected:
  ~KeysAndValues() = default;
};

struct AttentionShape {
  int heads;
  int head_dim;
  int64_t q_stride;    // from token to token
  int64_t q_head;      // from head to head
  int64_t out_stride;  // heads lie side by side
  bool rounded;        // many queries at once may be multiplied in bfloat16
};

// out[row][head * head_dim ...] for all rows of `work`, which are all of kDecode or all of the others. Their
// bits depend on the query and its keys alone: neither on the other work nor on the number of threads.
void attention(Context& context, const AttentionShape& shape, const float* q, const KeysAndValues& kv,
               const Queries* work, int64_t n_work, float* out);

// Rows of queries that make a good piece of work.
constexpr int kQueryRows = 256;

// Keys and values that lie in memory row by row, as in the vision tower.
struct DenseKv final : KeysAndValues {
  const float *keys, *values;
  int64_t stride, head;  // from token to token and from head to head

  DenseKv(const float* keys, const float* values, int64_t stride, int64_t head)
      : keys(keys), values(values), stride(stride), head(head) {
    tile_tokens = 128;
  }
  KvTile tile(const Queries& queries, int head_index, int64_t i) const override;
};

}  // namespace qvl::cpu
