#include "cpu/resampler.h"

#include <cmath>
#include <cstring>

#include "core/config.h"
#include "cpu/attention.h"
#include "cpu/vision.h"

namespace qvl::cpu {
namespace {

const std::string kPool = "visual.attn_pool.";

}  // namespace

Resampler::Resampler(const qvl_config& config, Weights& weights, Context& context)
    : config_(config), has_kv_proj_(config.vision_width != config.hidden) {
  const int64_t hidden = config.hidden, n = config.n_queries;
  if (has_kv_proj_) kv_proj_ = weights.matrix(kPool + "kv_proj.weight");
  ln_kv_ = weights.norm(kPool + "ln_kv");
  key_positions_ = weights.floats(kPool + "key_pos_embed");
  const Matrix in_proj = weights.matrix(kPool + "attn.in_proj_weight", kPool + "attn.in_proj_bias");
  key_ = in_proj.slice(hidden, hidden);
  value_ = in_proj.slice(2 * hidden, hidden);
  out_proj_ = weights.linear(kPool + "attn.out_proj");
  ln_post_ = weights.norm("visual.ln_post");
  proj_ = weights.matrix("visual.proj");

  auto* queries = queries_.get<float>(size(n * hidden));
  auto* normed = mixed_.get<float>(size(n * hidden));
  layer_norm_rows(context, weights.norm(kPool + "ln_q"), weights.floats(kPool + "query"), n, config.hidden,
                  normed);
  context.kernels.add(weights.floats(kPool + "pos_embed"), normed, n * hidden);
  // Rows {n, 0}: as rows of prompts, which use the blocked product.
  linear(context, in_proj.slice(0, hidden), normed, hidden, {n, 0}, queries, hidden);
  const float scale = 1 / std::sqrt(static_cast<float>(kResamplerHeadDim));
  for (int64_t i = 0; i < n * hidden; ++i) queries[i] *= scale;
}

void Resampler::run(Context& context, const float* hidden_states, float* features) {
  const int64_t hidden = config_.hidden, n = patches(config_), n_queries = config_.n_queries;
  auto* kv = kv_.get<float>(size(n * hidden));
  auto* key_input = key_input_.get<float>(size(n * hidden));
  auto* keys = keys_.get<float>(size(n * hidden));
  auto* values = values_.get<float>(size(n * hidden));
  auto* mixed = mixed_.get<float>(size(n_queries * hidden));
  auto* out = out_.get<float>(size(n_queries * hidden));
  if (has_kv_proj_) {
    linear(context, kv_proj_, hidden_states, config_.vision_width, {n, 0}, kv, hidden);
    hidden_states = kv;
  }
  layer_norm_rows(context, ln_kv_, hidden_states, n, config_.hidden, kv);
  std::memcpy(key_input, kv, size(n * hidden) * sizeof(float));
  context.kernels.add(key_positions_, key_input, n * hidden);
  linear(context, key_, key_input, hidden, {n, 0}, keys, hidden);
  linear(context, value_, kv, hidden, {n, 0}, values, hidden);

  const DenseKv source(keys, values, hidden, kResamplerHeadDim);
  std::vector<Queries> work;
  for (int64_t first = 0; first < n_queries; first += kQueryTile) {
    work.push_back({first, static_cast<int>(std::min<int64_t>(kQueryTile, n_queries - first)), n, kAllKeys});
  }
  // heads, head_dim, q_stride, q_head, out_stride, rounded (like the products: unless weights are float32)
  const AttentionShape shape{
      config_.hidden / kResamplerHeadDim, kResamplerHeadDim, hidden, kResamplerHeadDim, hidden,
      key_.dtype != QVL_FLOAT32};
  attention(context, shape, queries_.get<float>(size(n_queries * hidden)), source, work.data(),
            static_cast<int64_t>(work.size()), mixed);
  linear(context, out_proj_, mixed, hidden, {n_queries, 0}, out, hidden);
  layer_norm_rows(context, ln_post_, out, n_queries, config_.hidden, out);
  linear(context, proj_, out, hidden, {n_queries, 0}, features, hidden);
}

}  // namespace qvl::cpu
