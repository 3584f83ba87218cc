#include "cpu/language.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "cpu/rotary.h"

namespace qvl::cpu {
namespace {

// Keys and values of a layer by the sequences' block tables.
struct PagedKv final : KeysAndValues {
  const CpuKvPool& pool;
  int layer, head_dim;
  std::vector<const int32_t*> tables;  // of each Queries of the work
  const Queries* work;

  PagedKv(const CpuKvPool& pool, int layer, int head_dim) : pool(pool), layer(layer), head_dim(head_dim) {
    tile_tokens = pool.block_tokens;
  }
  KvTile tile(const Queries& queries, int head, int64_t i) const override {
    const int32_t block = tables[static_cast<size_t>(&queries - work)][i];
    const auto n = static_cast<int>(std::min<int64_t>(tile_tokens, queries.n_keys - i * tile_tokens));
    return {pool.head(layer, block, 0, head), pool.head(layer, block, 1, head), head_dim, pool.dtype, n};
  }
};

}  // namespace

Language::Language(const qvl_config& config, Weights& weights) : config_(config) {
  const Matrix wte = weights.matrix("wte.weight");
  wte_ = wte.values;
  wte_dtype_ = wte.dtype;
  for (int i = 0; i < config.layers; ++i) {
    const std::string name = "h." + std::to_string(i) + ".";
    Layer layer;
    layer.ln_1 = weights.floats(name + "ln_1.weight");
    layer.c_attn = weights.linear(name + "attn.c_attn");
    layer.attn_proj = weights.matrix(name + "attn.c_proj.weight");
    layer.ln_2 = weights.floats(name + "ln_2.weight");
    layer.w1 = weights.matrix(name + "mlp.w1.weight");
    layer.w2 = weights.matrix(name + "mlp.w2.weight");
    layer.mlp_proj = weights.matrix(name + "mlp.c_proj.weight");
    layers_.push_back(layer);
  }
  ln_f_ = weights.floats("ln_f.weight");
  lm_head_ = weights.matrix("lm_head.weight");
}

void Language::forward(Context& context, CpuKvPool& pool, const qvl_batch& batch, float* logits) {
  check_ids(batch);
  std::vector<Piece> pieces;
  int64_t first_token = 0, n = 0;
  const auto run = [&] {
    pass(context, pool, batch, pieces, first_token, n, logits);
    const auto rows =
        std::count_if(pieces.begin(), pieces.end(), [](const Piece& piece) { return piece.last; });
    if (logits != nullptr) logits += rows * config_.vocab;
    first_token += n;
    n = 0;
    pieces.clear();
  };
  for (int32_t i = 0; i < batch.n_sequences; ++i) {
    const qvl_sequence& sequence = batch.sequences[i];
    for (int32_t done = 0; done < sequence.n_new;) {
      const auto room = static_cast<int32_t>(config_.max_tokens - n);
      const int32_t part = std::min(sequence.n_new - done, room);
      const bool last = done + part == sequence.n_new && (sequence.flags & QVL_SEQUENCE_NO_LOGITS) == 0;
      pieces.push_back({i, n, part, sequence.n_past + done, last});
      n += part;
      done += part;
      if (n == config_.max_tokens) run();
    }
  }
  if (n > 0) run();
}

void Language::check_ids(const qvl_batch& batch) const {
  int64_t n_tokens = 0;
  for (int32_t i = 0; i < batch.n_sequences; ++i) n_tokens += batch.sequences[i].n_new;
  int64_t token = 0;
  for (int32_t s = 0; s <= batch.n_spans; ++s) {
    const int64_t end = s < batch.n_spans ? batch.spans[s].start : n_tokens;
    for (; token < end; ++token) {
      QVL_REQUIRE(batch.tokens[token] >= 0 && batch.tokens[token] < config_.vocab, QVL_INVALID,
                  "batch: tokens[%lld] is %d; the vocabulary has %d", static_cast<long long>(token),
                  batch.tokens[token], config_.vocab);
    }
    if (s < batch.n_spans) token += batch.spans[s].count;
  }
}

void Language::embed(Context& context, const qvl_batch& batch, int64_t first_token, int64_t n,
                     float* x) const {
  const int64_t hidden = config_.hidden;
  const qvl_span* span = batch.spans;
  const qvl_span* const spans_end = batch.spans + batch.n_spans;
  for (int64_t i = 0; i < n; ++i, x += hidden) {
    const int64_t token = first_token + i;
    while (span != spans_end && token >= int64_t{span->start} + span->count) ++span;
    if (span != spans_end && token >= span->start) {
      std::memcpy(x, span->features + (token - span->start) * hidden, size(hidden) * sizeof(float));
    } else if (wte_dtype_ == QVL_FLOAT32) {
      std::memcpy(x, static_cast<const float*>(wte_) + batch.tokens[token] * hidden,
                  size(hidden) * sizeof(float));
    } else {
      const auto widen = wte_dtype_ == QVL_FLOAT16 ? context.kernels.widen_float16 : context.kernels.widen;
      widen(static_cast<const uint16_t*>(wte_) + batch.tokens[token] * hidden, x, hidden);
    }
  }
}

void Language::place(const qvl_batch& batch, const std::vector<Piece>& pieces) {
  const auto half = size(config_.head_dim / 2);
  std::vector<float> frequencies(half);
  cos_.clear();
  sin_.clear();
  query_scale_.clear();
  block_.clear();
  slot_.clear();
  for (const Piece& piece : pieces) {
    rotary_frequencies(config_, batch.sequences[piece.sequence].prompt_len, frequencies.data());
    for (int32_t i = 0; i < piece.n; ++i) {
      const size_t at = cos_.size();
      cos_.resize(at + half);
      sin_.resize(at + half);
      rotary_row(config_, frequencies.data(), piece.past + i, &cos_[at], &sin_[at]);
      query_scale_.push_back(query_scale(config_, piece.past + i));
      block_.push_back(piece.sequence);  // the block follows when the pool is known
      slot_.push_back(piece.past + i);
    }
  }
}

void Language::pass(Context& context, CpuKvPool& pool, const qvl_batch& batch,
                    const std::vector<Piece>& pieces, int64_t first_token, int64_t n, float* logits) {
  const int64_t hidden = config_.hidden;
  const Kernels& kernels = context.kernels;
  auto* x = x_.get<float>(size(n * hidden));
  auto* normed = normed_.get<float>(size(n * hidden));
  embed(context, batch, first_token, n, x);
  place(batch, pieces);
  for (size_t i = 0; i < size(n); ++i) {
    const int32_t position = slot_[i];
    block_[i] = batch.sequences[block_[i]].blocks[position / pool.block_tokens];
    slot_[i] = position % pool.block_tokens;
  }
  for (int i = 0; i < config_.layers; ++i) {
    attend(context, pool, batch, pieces, i, n);
    feed_forward(context, layers_[size(i)], n);
  }
  if (logits == nullptr) return;
  // The last tokens side by side, then the head for all of them.
  int64_t n_last = 0;
  for (const Piece& piece : pieces) {
    if (!piece.last) continue;
    kernels.rms_norm(x + (piece.first + piece.n - 1) * hidden, ln_f_, config_.hidden, config_.norm_epsilon,
                     normed + n_last++ * hidden);
  }
  if (n_last == 0) return;
  linear(context, lm_head_, normed, hidden, n_last, logits, config_.vocab);
}

void Language::attend(Context& context, CpuKvPool& pool, const qvl_batch& batch,
                      const std::vector<Piece>& pieces, int layer_index, int64_t n) {
  const Layer& layer = layers_[size(layer_index)];
  const Kernels& kernels = context.kernels;
  const int64_t hidden = config_.hidden;
  const int head_dim = config_.head_dim;
  auto* x = x_.get<float>(size(n * hidden));
  auto* normed = normed_.get<float>(size(n * hidden));
  auto* qkv = qkv_.get<float>(size(n * 3 * hidden));
  auto* mixed = mixed_.get<float>(size(n * hidden));
  context.rows(n, [&](int64_t i, int) {
    kernels.rms_norm(x + i * hidden, layer.ln_1, config_.hidden, config_.norm_epsilon, normed + i * hidden);
  });
  linear(context, layer.c_attn, normed, hidden, n, qkv, 3 * hidden);
  context.rows(n, [&](int64_t i, int) {
    float* q = qkv + i * 3 * hidden;
    float* k = q + hidden;
    const float* cos = &cos_[size(i * (head_dim / 2))];
    const float* sin = &sin_[size(i * (head_dim / 2))];
    for (int h = 0; h < config_.heads; ++h) {
      kernels.rotate(q + h * head_dim, cos, sin, head_dim, query_scale_[size(i)]);
      kernels.rotate(k + h * head_dim, cos, sin, head_dim, 1);
    }
    pool.write(kernels, layer_index, block_[size(i)], slot_[size(i)], 0, k);
    pool.write(kernels, layer_index, block_[size(i)], slot_[size(i)], 1, k + hidden);
  });
  PagedKv kv(pool, layer_index, head_dim);
  std::vector<Queries> work;
  for (const Piece& piece : pieces) {
    for (int32_t done = 0; done < piece.n; done += kQueryRows) {
      const int32_t part = std::min(kQueryRows, piece.n - done);
      work.push_back({piece.first + done, part, int64_t{piece.past} + done + part, true});
      kv.tables.push_back(batch.sequences[piece.sequence].blocks);
    }
  }
  kv.work = work.data();
  const AttentionShape shape{config_.heads, head_dim, 3 * hidden,
                             head_dim,      hidden,   layer.c_attn.dtype != QVL_FLOAT32};
  attention(context, shape, qkv, kv, work.data(), static_cast<int64_t>(work.size()), mixed);
  linear(context, layer.attn_proj, mixed, hidden, n, x, hidden, true);
}

void Language::feed_forward(Context& context, const Layer& layer, int64_t n) {
  const Kernels& kernels = context.kernels;
  const int64_t hidden = config_.hidden, width = config_.mlp_width;
  auto* x = x_.get<float>(size(n * hidden));
  auto* normed = normed_.get<float>(size(n * hidden));
  auto* gate = gate_.get<float>(size(n * width));
  auto* up = up_.get<float>(size(n * width));
  context.rows(n, [&](int64_t i, int) {
    kernels.rms_norm(x + i * hidden, layer.ln_2, config_.hidden, config_.norm_epsilon, normed + i * hidden);
  });
  linear(context, layer.w1, normed, hidden, n, up, width);
  linear(context, layer.w2, normed, hidden, n, gate, width);
  context.rows(n, [&](int64_t i, int) { kernels.silu_mul(gate + i * width, up + i * width, width); });
  linear(context, layer.mlp_proj, up, width, n, x, hidden, true);
}

}  // namespace qvl::cpu
