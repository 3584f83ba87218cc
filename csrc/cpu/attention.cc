#include "cpu/attention.h"

#include <algorithm>
#include <cstring>

namespace qvl::cpu {
namespace {

// Fewer queries than this each read the keys as they lie; more share rearranged tiles.
constexpr int kFewQueries = 4;

struct Task {
  const Kernels& kernels;
  const AttentionShape& shape;
  const KeysAndValues& kv;
  const Queries& queries;
  int head;
  int64_t padded;  // head_dim, to whole vectors

  void few(const float* q, float* out, float* scratch) const {
    float state[2];
    for (int i = 0; i < queries.n; ++i) {
      const int64_t seen = queries.causal ? queries.n_keys - queries.n + i + 1 : queries.n_keys;
      kernels.attend_begin(1, padded, state, scratch);
      for (int64_t start = 0, t = 0; start < seen; start += kv.tile_tokens, ++t) {
        KvTile tile = kv.tile(queries, head, t);
        tile.n = static_cast<int>(std::min<int64_t>(tile.n, seen - start));
        kernels.attend_one(q + i * shape.q_stride, shape.head_dim, tile, state, scratch);
      }
      kernels.attend_end(state, 1, padded, scratch);
      std::memcpy(out + i * shape.out_stride, scratch, static_cast<size_t>(shape.head_dim) * sizeof(float));
    }
  }

  void many(const float* q, float* out, float* scratch) const {
    float* state = scratch;
    float* sums = state + 2 * kQueryRows;
    float* rest = sums + kQueryRows * padded;
    kernels.attend_begin(queries.n, padded, state, sums);
    const auto run = shape.rounded && kernels.bf16_dot ? kernels.attend_rounded : kernels.attend;
    for (int64_t start = 0, t = 0; start < queries.n_keys; start += kv.tile_tokens, ++t) {
      const KvTile tile = kv.tile(queries, head, t);
      const int64_t visible = queries.causal ? queries.n_keys - queries.n + 1 - start : queries.n_keys;
      // The first queries may see nothing of the last tiles.
      const int skip = static_cast<int>(std::clamp<int64_t>(1 - visible, 0, queries.n));
      run(q + skip * shape.q_stride, shape.q_stride, queries.n - skip, shape.head_dim, tile, visible + skip,
          state + 2 * skip, sums + skip * padded, padded, rest);
    }
    kernels.attend_end(state, queries.n, padded, sums);
    for (int i = 0; i < queries.n; ++i) {
      std::memcpy(out + i * shape.out_stride, sums + i * padded,
                  static_cast<size_t>(shape.head_dim) * sizeof(float));
    }
  }
};

}  // namespace

KvTile DenseKv::tile(const Queries& queries, int head_index, int64_t i) const {
  const int64_t first = i * tile_tokens;
  const auto n = static_cast<int>(std::min<int64_t>(tile_tokens, queries.n_keys - first));
  const int64_t start = first * stride + head_index * head;
  return {keys + start, values + start, stride, QVL_FLOAT32, n};
}

void attention(Context& context, const AttentionShape& shape, const float* q, const KeysAndValues& kv,
               const Queries* work, int64_t n_work, float* out) {
  const Kernels& kernels = context.kernels;
  const int64_t padded = (shape.head_dim + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  const size_t floats =
      static_cast<size_t>(kQueryRows * (padded + 2)) +
      kernels.attend_scratch_bytes(shape.head_dim, kQueryRows, kv.tile_tokens) / sizeof(float);
  for (Buffer& buffer : context.of_thread) buffer.get<float>(floats);
  // The last pieces first: with causal attention they are the longest.
  context.pool.run(n_work * shape.heads, [&](int64_t i, int thread) {
    const Queries& queries = work[n_work - 1 - i / shape.heads];
    const auto head = static_cast<int>(i % shape.heads);
    const Task task{kernels, shape, kv, queries, head, padded};
    const float* from = q + queries.first * shape.q_stride + head * shape.q_head;
    float* to = out + queries.first * shape.out_stride + int64_t{head} * shape.head_dim;
    float* scratch = context.of_thread[static_cast<size_t>(thread)].get<float>(floats);
    if (queries.n < kFewQueries) {
      task.few(from, to, scratch);
    } else {
      task.many(from, to, scratch);
    }
  });
}

}  // namespace qvl::cpu
