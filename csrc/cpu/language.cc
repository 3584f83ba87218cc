#include "cpu/language.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "core/error.h"
#include "core/rotary.h"

namespace qvl::cpu {
namespace {

// Keys and values of a layer, located by the sequences' block tables.
struct PagedKv final : KeysAndValues {
  const CpuKvPool& pool;
  int layer;

  PagedKv(const CpuKvPool& pool, int layer) : pool(pool), layer(layer) { tile_tokens = pool.block_tokens; }
  KvTile tile(const Queries& queries, int head, int64_t i) const override {
    const auto n = static_cast<int>(std::min<int64_t>(tile_tokens, queries.n_keys - i * tile_tokens));
    return pool.tile(layer, queries.blocks[i], head, n);
  }
};

const CpuAdapter* adapter_of(const Part& part) {
  const qvl_adapter* adapter = part.sequence->adapter;
  return adapter != nullptr ? static_cast<const CpuAdapter*>(adapter->matrices.get()) : nullptr;
}

// Append n rows to `runs`; if they follow the last run and have its adapter and `decode`, extend that run.
void append_rows(std::vector<AdapterRows>& runs, const CpuAdapter* adapter, int64_t first, int64_t n,
                 bool decode) {
  if (adapter == nullptr) return;
  if (!runs.empty()) {
    AdapterRows& last = runs.back();
    if (last.adapter == adapter && last.decode == decode && last.first + last.n == first) {
      last.n += n;
      return;
    }
  }
  runs.push_back({adapter, first, n, decode});
}

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
  check_ids(batch, config_.vocab);
  for_each_pass(batch, config_.max_tokens, logits != nullptr,
                [&](std::vector<Part>& parts) { pass(context, pool, batch, parts, logits); });
}

void Language::embed(Context& context, const qvl_batch& batch, const Part& part, float* x) const {
  const int64_t hidden = config_.hidden;
  const qvl_span* span = batch.spans;
  const qvl_span* const spans_end = batch.spans + batch.n_spans;
  for (int64_t token = part.token; token < part.token + part.n; ++token, x += hidden) {
    while (span != spans_end && token >= int64_t{span->start} + span->count) ++span;
    if (span != spans_end && token >= span->start) {
      std::memcpy(x, span->features + (token - span->start) * hidden, size(hidden) * sizeof(float));
    } else if (wte_dtype_ == QVL_FLOAT32) {
      std::memcpy(x, static_cast<const float*>(wte_) + batch.tokens[token] * hidden,
                  size(hidden) * sizeof(float));
    } else {  // the embeddings are not quantized (core/weights.cc)
      const auto widen = wte_dtype_ == QVL_FLOAT16 ? context.kernels.widen_float16 : context.kernels.widen;
      widen(static_cast<const uint16_t*>(wte_) + batch.tokens[token] * hidden, x, hidden);
    }
  }
}

// Append rotary angles, query scales, blocks and slots of the part's rows, and its work items of attention.
void Language::add_rows(const CpuKvPool& pool, const Part& part) {
  const qvl_sequence& sequence = *part.sequence;
  const auto half = size(config_.head_dim / 2);
  std::vector<float> frequencies(half);
  rotary_frequencies(config_, sequence.prompt_len, frequencies.data());
  for (int32_t position = part.past; position < part.past + part.n; ++position) {
    const size_t index = cos_.size();
    cos_.resize(index + half);
    sin_.resize(index + half);
    rotary_row(config_, frequencies.data(), position, &cos_[index], &sin_[index]);
    query_scale_.push_back(query_scale(config_, position));
    block_.push_back(sequence.blocks[position / pool.block_tokens]);
    slot_.push_back(position % pool.block_tokens);
  }
  for (int32_t done = 0; done < part.n; done += kQueryTile) {
    const int32_t n = std::min(kQueryTile, part.n - done);
    std::vector<Queries>& work = part.generated ? decode_work_ : prompt_work_;
    work.push_back({part.first + done, n, int64_t{part.past} + done + n, part.generated ? kDecode : kCausal,
                    sequence.blocks});
  }
}

void Language::pass(Context& context, CpuKvPool& pool, const qvl_batch& batch, std::vector<Part>& parts,
                    float* logits) {
  Rows rows{0, 0};
  for (const Part& part : parts) (part.generated ? rows.decode : rows.prompt) += part.n;
  const int64_t hidden = config_.hidden;
  auto* x = x_.get<float>(size(rows.n() * hidden));
  auto* normed = normed_.get<float>(size(rows.n() * hidden));
  cos_.clear();
  sin_.clear();
  query_scale_.clear();
  block_.clear();
  slot_.clear();
  prompt_work_.clear();
  decode_work_.clear();
  // Sort the parts, so that the rows of a kind and of an adapter are consecutive: prompts before decode
  // steps, and within each kind by adapter.
  std::vector<Part*> order;
  for (Part& part : parts) order.push_back(&part);
  std::stable_sort(order.begin(), order.end(), [](const Part* a, const Part* b) {
    if (a->generated != b->generated) return b->generated;
    return std::less<const CpuAdapter*>()(adapter_of(*a), adapter_of(*b));
  });
  adapter_rows_.clear();
  int64_t next_row = 0;
  for (Part* part : order) {
    part->first = next_row;
    next_row += part->n;
    embed(context, batch, *part, x + part->first * hidden);
    add_rows(pool, *part);
    append_rows(adapter_rows_, adapter_of(*part), part->first, part->n, part->generated);
  }
  for (int i = 0; i < config_.layers; ++i) {
    attend(context, pool, i, rows);
    feed_forward(context, i, rows);
  }
  // lm_head for the last token of every sequence that wants logits, whose rows of `logits` are consecutive.
  // The rows count as decode rows, also for prompts: lm_head does not round activations to bfloat16
  // (qwenvl.h).
  int64_t n_last = 0;
  int32_t first_logits = 0;
  adapter_rows_.clear();
  for (const Part& part : parts) {
    if (part.logits < 0) continue;
    if (n_last == 0) first_logits = part.logits;
    append_rows(adapter_rows_, adapter_of(part), n_last, 1, /*decode=*/true);
    context.kernels.rms_norm(x + (part.first + part.n - 1) * hidden, ln_f_, config_.hidden,
                             config_.norm_epsilon, normed + n_last++ * hidden);
  }
  if (n_last == 0) return;
  float* const to = logits + int64_t{first_logits} * config_.vocab;
  linear(context, lm_head_, normed, hidden, {0, n_last}, to, config_.vocab);
  add_low_rank(context, adapter_rows_, int64_t{config_.layers} * kLayerTargets, normed, hidden, to,
               config_.vocab, low_rank_);
}

void Language::product(Context& context, int layer, LayerTarget target, const Matrix& matrix, const float* x,
                       int64_t x_stride, Rows rows, float* y, int64_t y_stride, bool add) {
  linear(context, matrix, x, x_stride, rows, y, y_stride, add);
  add_low_rank(context, adapter_rows_, int64_t{layer} * kLayerTargets + target, x, x_stride, y, y_stride,
               low_rank_);
}

void Language::attend(Context& context, CpuKvPool& pool, int layer_index, Rows rows) {
  const Layer& layer = layers_[size(layer_index)];
  const Kernels& kernels = context.kernels;
  const int64_t hidden = config_.hidden, n = rows.n();
  const int head_dim = config_.head_dim;
  // The memory that pass() has filled: the buffer does not grow. Likewise in feed_forward().
  auto* x = x_.get<float>(size(n * hidden));
  auto* normed = normed_.get<float>(size(n * hidden));
  auto* qkv = qkv_.get<float>(size(n * 3 * hidden));
  auto* mixed = mixed_.get<float>(size(n * hidden));
  context.rows(n, hidden, [&](int64_t i, int) {
    kernels.rms_norm(x + i * hidden, layer.ln_1, config_.hidden, config_.norm_epsilon, normed + i * hidden);
  });
  product(context, layer_index, kAttn, layer.c_attn, normed, hidden, rows, qkv, 3 * hidden);
  context.rows(n, 3 * hidden, [&](int64_t i, int) {
    float* q = qkv + i * 3 * hidden;
    float* k = q + hidden;
    const float* cos = &cos_[size(i * (head_dim / 2))];
    const float* sin = &sin_[size(i * (head_dim / 2))];
    for (int h = 0; h < config_.heads; ++h) {
      kernels.rotate(q + h * head_dim, cos, sin, head_dim, query_scale_[size(i)]);
      kernels.rotate(k + h * head_dim, cos, sin, head_dim, 1);
    }
    pool.write(kernels, layer_index, block_[size(i)], slot_[size(i)], /*part=*/0, k);
    pool.write(kernels, layer_index, block_[size(i)], slot_[size(i)], /*part=*/1, k + hidden);
  });
  const PagedKv kv(pool, layer_index);
  // heads, head_dim, q_stride, q_head, out_stride, rounded (like the products: unless weights are float32)
  const AttentionShape shape{config_.heads, head_dim, 3 * hidden,
                             head_dim,      hidden,   layer.c_attn.dtype != QVL_FLOAT32};
  // attention() takes work of one kind per call.
  for (const std::vector<Queries>* work : {&prompt_work_, &decode_work_}) {
    attention(context, shape, qkv, kv, work->data(), static_cast<int64_t>(work->size()), mixed);
  }
  product(context, layer_index, kAttnProj, layer.attn_proj, mixed, hidden, rows, x, hidden, /*add=*/true);
}

void Language::feed_forward(Context& context, int layer_index, Rows rows) {
  const Layer& layer = layers_[size(layer_index)];
  const Kernels& kernels = context.kernels;
  const int64_t hidden = config_.hidden, width = config_.mlp_width, n = rows.n();
  auto* x = x_.get<float>(size(n * hidden));
  auto* normed = normed_.get<float>(size(n * hidden));
  auto* gate = gate_.get<float>(size(n * width));
  auto* up = up_.get<float>(size(n * width));
  context.rows(n, hidden, [&](int64_t i, int) {
    kernels.rms_norm(x + i * hidden, layer.ln_2, config_.hidden, config_.norm_epsilon, normed + i * hidden);
  });
  product(context, layer_index, kW1, layer.w1, normed, hidden, rows, up, width);
  product(context, layer_index, kW2, layer.w2, normed, hidden, rows, gate, width);
  context.rows(n, width, [&](int64_t i, int) { kernels.silu_mul(gate + i * width, up + i * width, width); });
  product(context, layer_index, kMlpProj, layer.mlp_proj, up, width, rows, x, hidden, /*add=*/true);
}

}  // namespace qvl::cpu
