#include "cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace qvl::cpu {
namespace {

// Maximum number of keys per chunk in decode attention. Each chunk has a separate softmax, and the partial
// results are merged in order. Several threads can thus share a long context, and the result does not depend
// on the number of threads.
constexpr int kChunkKeys = kMaxKvTile;

// Arguments and sizes that PromptAttention and DecodeAttention share.
struct AttentionBase {
  const Kernels& kernels;
  const AttentionShape& shape;
  const KeysAndValues& kv;
  int64_t padded;  // head_dim rounded up to whole vectors

  AttentionBase(const Kernels& kernels, const AttentionShape& shape, const KeysAndValues& kv)
      : kernels(kernels),
        shape(shape),
        kv(kv),
        padded((shape.head_dim + kernels.lanes - 1) / kernels.lanes * kernels.lanes) {}
};

// Attention of prompt rows and images: up to kQueryTile queries of one head.
struct PromptAttention : AttentionBase {
  using AttentionBase::AttentionBase;

  size_t scratch_floats() const {
    return static_cast<size_t>(kQueryTile * (padded + 2)) +
           kernels.attend_scratch_bytes(shape.head_dim, kQueryTile, kv.tile_tokens) / sizeof(float);
  }

  void run(const Queries& queries, int head, const float* q, float* out, float* scratch) const {
    float* state = scratch;
    float* sums = state + 2 * kQueryTile;
    float* attend_scratch = sums + kQueryTile * padded;
    kernels.attend_begin(queries.n, padded, state, sums);
    const auto attend = shape.rounded && kernels.bf16_dot ? kernels.attend_rounded : kernels.attend;
    for (int64_t start = 0, t = 0; start < queries.n_keys; start += kv.tile_tokens, ++t) {
      const KvTile tile = kv.tile(queries, head, t);
      // With kCausal the number of keys from `start` on that the first query sees, 0 or less if it sees none;
      // each query sees one key more than the previous one. With kAllKeys at least the number of the tile's
      // keys, so that every query sees them all.
      const int64_t visible =
          queries.mask == kCausal ? queries.n_keys - queries.n + 1 - start : queries.n_keys;
      // Skip the first queries if they see no key of this tile.
      const int skip = static_cast<int>(std::clamp<int64_t>(1 - visible, 0, queries.n));
      attend(q + skip * shape.q_stride, shape.q_stride, queries.n - skip, shape.head_dim, tile,
             visible + skip, state + 2 * skip, sums + skip * padded, padded, attend_scratch);
    }
    kernels.attend_end(state, queries.n, padded, sums);
    for (int i = 0; i < queries.n; ++i) {
      std::memcpy(out + i * shape.out_stride, sums + i * padded,
                  static_cast<size_t>(shape.head_dim) * sizeof(float));
    }
  }
};

// Attention of decode rows: one query of one head, in chunks of keys. The partial result of a chunk is a
// weighted sum of values [padded], followed by its state [2] (maximum, sum).
struct DecodeAttention : AttentionBase {
  int64_t chunk_tiles;

  DecodeAttention(const Kernels& kernels, const AttentionShape& shape, const KeysAndValues& kv)
      : AttentionBase(kernels, shape, kv), chunk_tiles(std::max(1, kChunkKeys / kv.tile_tokens)) {}

  int64_t result_floats() const { return padded + 2; }  // size of a partial result
  int64_t chunks(int64_t n_keys) const {
    const int64_t keys = chunk_tiles * kv.tile_tokens;
    return (n_keys + keys - 1) / keys;
  }

  // Partial result of chunk i.
  void chunk(const Queries& queries, int head, const float* q, int64_t i, float* sums) const {
    KvTile tiles[kMaxKvTile];
    int n = 0;
    for (int64_t t = i * chunk_tiles; t < (i + 1) * chunk_tiles && t * kv.tile_tokens < queries.n_keys; ++t) {
      tiles[n++] = kv.tile(queries, head, t);
    }
    kernels.attend_begin(1, padded, sums + padded, sums);
    kernels.attend_one(q, shape.head_dim, tiles, n, sums + padded, sums);
  }
  // Merge the partial result `from` into `sums`.
  void merge(const float* from, float* sums) const {
    kernels.attend_merge(from + padded, from, padded, sums + padded, sums);
  }
  // Normalise the merged result and write head_dim values.
  void finish(float* sums, float* out) const {
    kernels.attend_end(sums + padded, 1, padded, sums);
    std::memcpy(out, sums, static_cast<size_t>(shape.head_dim) * sizeof(float));
  }
};

// Attention of decode rows: each work item has one query.
void attend_decode(Context& context, const AttentionShape& shape, const float* q, const KeysAndValues& kv,
                   const std::vector<Queries>& work, float* out) {
  const DecodeAttention decode(context.kernels, shape, kv);
  const auto n_work = static_cast<int64_t>(work.size());
  const auto from = [&](const Queries& queries, int64_t head) {
    return q + queries.first * shape.q_stride + head * shape.q_head;
  };
  const auto to = [&](const Queries& queries, int64_t head) {
    return out + queries.first * shape.out_stride + head * shape.head_dim;
  };
  int64_t n_keys = 0, n_chunks = 0;
  for (const Queries& queries : work) {
    n_keys += queries.n_keys;
    n_chunks += decode.chunks(queries.n_keys);
  }
  const int64_t operations = 2 * n_keys * shape.heads * shape.head_dim;
  // With one thread, with one chunk per query, or if there are at least 8 pairs of a query and a head for
  // each thread, enough to balance the load, a task is such a pair with all its chunks.
  if (context.pool.size() == 1 || n_chunks == n_work || n_work * shape.heads >= 8 * context.pool.size()) {
    // Allocate now; in the tasks get(0) returns this memory.
    for (Buffer& buffer : context.thread_scratch)
      buffer.get<float>(static_cast<size_t>(2 * decode.result_floats()));
    context.run(n_work * shape.heads, operations, [&](int64_t i, int thread) {
      const Queries& queries = work[static_cast<size_t>(i / shape.heads)];
      const auto head = static_cast<int>(i % shape.heads);
      float* sums = context.thread_scratch[static_cast<size_t>(thread)].get<float>(0);
      float* next_chunk = sums + decode.result_floats();
      decode.chunk(queries, head, from(queries, head), 0, sums);
      for (int64_t c = 1; c < decode.chunks(queries.n_keys); ++c) {
        decode.chunk(queries, head, from(queries, head), c, next_chunk);
        decode.merge(next_chunk, sums);
      }
      decode.finish(sums, to(queries, head));
    });
    return;
  }
  // With few heads and long contexts a task is a single chunk of such a pair.
  struct Chunk {
    const Queries* queries;
    int64_t index;
  };
  std::vector<Chunk> chunks;
  for (const Queries& queries : work) {
    for (int64_t c = 0; c < decode.chunks(queries.n_keys); ++c) chunks.push_back({&queries, c});
  }
  float* results = context.activations.get<float>(size(n_chunks * shape.heads * decode.result_floats()));
  const auto sums_of = [&](int64_t chunk, int64_t head) {
    return results + (chunk * shape.heads + head) * decode.result_floats();
  };
  context.run(n_chunks * shape.heads, operations, [&](int64_t i, int) {
    const Chunk& chunk = chunks[static_cast<size_t>(i / shape.heads)];
    const auto head = static_cast<int>(i % shape.heads);
    decode.chunk(*chunk.queries, head, from(*chunk.queries, head), chunk.index,
                 sums_of(i / shape.heads, head));
  });
  for (int64_t head = 0; head < shape.heads; ++head) {
    for (int64_t c = 0; c < n_chunks;) {
      const Queries& queries = *chunks[static_cast<size_t>(c)].queries;
      float* sums = sums_of(c++, head);
      for (; c < n_chunks && chunks[static_cast<size_t>(c)].index > 0; ++c)
        decode.merge(sums_of(c, head), sums);
      decode.finish(sums, to(queries, head));
    }
  }
}

}  // namespace

KvTile DenseKv::tile(const Queries& queries, int head, int64_t i) const {
  const int64_t first = i * tile_tokens;
  const auto n = static_cast<int>(std::min<int64_t>(tile_tokens, queries.n_keys - first));
  const int64_t start = first * token_stride + head * head_stride;
  return {keys + start, values + start, token_stride, QVL_FLOAT32, n};
}

void attention(Context& context, const AttentionShape& shape, const float* q, const KeysAndValues& kv,
               const Queries* work, int64_t n_work, float* out) {
  if (n_work == 0) return;
  if (work[0].mask == kDecode) {  // then all items have this mask (attention.h)
    std::vector<Queries> rows;
    for (const Queries* queries = work; queries != work + n_work; ++queries) {
      for (int i = 0; i < queries->n; ++i) {
        rows.push_back(
            {queries->first + i, 1, queries->n_keys - queries->n + i + 1, kDecode, queries->blocks});
      }
    }
    return attend_decode(context, shape, q, kv, rows, out);
  }
  const PromptAttention prompt(context.kernels, shape, kv);
  for (Buffer& buffer : context.thread_scratch) buffer.get<float>(prompt.scratch_floats());
  int64_t pairs = 0;
  for (const Queries* queries = work; queries != work + n_work; ++queries)
    pairs += queries->n * queries->n_keys;
  // Run the last items first: with causal attention the last items of a prompt take longest.
  context.run(n_work * shape.heads, 2 * pairs * shape.heads * shape.head_dim, [&](int64_t i, int thread) {
    const Queries& queries = work[n_work - 1 - i / shape.heads];
    const auto head = static_cast<int>(i % shape.heads);
    prompt.run(queries, head, q + queries.first * shape.q_stride + head * shape.q_head,
               out + queries.first * shape.out_stride + int64_t{head} * shape.head_dim,
               context.thread_scratch[static_cast<size_t>(thread)].get<float>(0));
  });
}

}  // namespace qvl::cpu
