#include "cpu/vision.h"

#include <cmath>
#include <cstring>

#include "core/config.h"
#include "cpu/attention.h"

namespace qvl::cpu {

void layer_norm_rows(Context& context, const Norm& norm, const float* x, int64_t n, int width, float* y) {
  context.rows(n, width, [&](int64_t i, int) {
    context.kernels.layer_norm(x + i * width, norm.weight, norm.bias, width, kVisionEpsilon, y + i * width);
  });
}

Vision::Vision(const qvl_config& config, Weights& weights, Context& context)
    : config_(config),
      patches_(patches(config)),
      conv1_(weights.matrix("visual.conv1.weight")),
      positions_(weights.floats("visual.positional_embedding")),
      ln_pre_(weights.norm("visual.ln_pre")),
      resampler_(config, weights, context) {
  for (int i = 0; i < config.vision_layers; ++i) {
    const std::string name = "visual.transformer.resblocks." + std::to_string(i) + ".";
    Block block;
    block.ln_1 = weights.norm(name + "ln_1");
    block.in_proj = weights.linear(name + "attn.in_proj");
    block.out_proj = weights.linear(name + "attn.out_proj");
    block.ln_2 = weights.norm(name + "ln_2");
    block.c_fc = weights.linear(name + "mlp.c_fc");
    block.c_proj = weights.linear(name + "mlp.c_proj");
    blocks_.push_back(block);
  }
}

// Copy the patches of an image to [patches][3][patch_size][patch_size]. The convolution of the patches is
// then a product with conv1.weight as stored.
void Vision::cut_patches(Context& context, const float* image, float* to) const {
  const int64_t side = config_.image_size, patch = config_.patch_size, grid = side / patch;
  context.rows(patches_, 3 * patch * patch, [&](int64_t i, int) {
    const int64_t top = i / grid * patch, left = i % grid * patch;
    float* row = to + i * 3 * patch * patch;
    for (int64_t line = 0; line < 3 * patch; ++line, row += patch) {
      const float* from = image + (line / patch * side + top + line % patch) * side + left;
      std::memcpy(row, from, size(patch) * sizeof(float));
    }
  });
}

void Vision::encode(Context& context, const float* image, float* features) {
  const int64_t width = config_.vision_width;
  const Rows rows{/*prompt=*/patches_, /*decode=*/0};
  auto* x = x_.get<float>(size(patches_ * width));
  auto* patches = wide_.get<float>(size(patches_ * std::max<int64_t>(conv1_.k, config_.vision_mlp_width)));
  cut_patches(context, image, patches);
  linear(context, conv1_, patches, conv1_.k, rows, x, width);
  context.kernels.add(positions_, x, patches_ * width);
  layer_norm_rows(context, ln_pre_, x, patches_, config_.vision_width, x);
  for (const Block& block : blocks_) run_block(context, block, x);
  resampler_.run(context, x, features);
}

void Vision::run_block(Context& context, const Block& block, float* x) {
  const int64_t width = config_.vision_width, mlp = config_.vision_mlp_width;
  const int head_dim = config_.vision_width / config_.vision_heads;
  const Rows rows{/*prompt=*/patches_, /*decode=*/0};
  auto* normed = normed_.get<float>(size(patches_ * width));
  auto* qkv = qkv_.get<float>(size(patches_ * 3 * width));
  auto* wide = wide_.get<float>(size(patches_ * std::max<int64_t>(conv1_.k, mlp)));
  layer_norm_rows(context, block.ln_1, x, patches_, config_.vision_width, normed);
  linear(context, block.in_proj, normed, width, rows, qkv, 3 * width);
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  // Layout of a row: [heads][q, k, v][head_dim].
  context.rows(patches_, width, [&](int64_t i, int) {
    for (int h = 0; h < config_.vision_heads; ++h) {
      float* q = qkv + i * 3 * width + h * 3 * head_dim;
      for (int d = 0; d < head_dim; ++d) q[d] *= scale;
    }
  });
  const DenseKv kv(qkv + head_dim, qkv + 2 * head_dim, 3 * width, 3 * head_dim);
  std::vector<Queries> work;
  for (int64_t first = 0; first < patches_; first += kQueryTile) {
    work.push_back(
        {first, static_cast<int>(std::min<int64_t>(kQueryTile, patches_ - first)), patches_, kAllKeys});
  }
  // heads, head_dim, q_stride, q_head, out_stride, rounded
  const AttentionShape shape{config_.vision_heads, head_dim, 3 * width,
                             3 * head_dim,         width,    block.in_proj.dtype != QVL_FLOAT32};
  attention(context, shape, qkv, kv, work.data(), static_cast<int64_t>(work.size()), normed);
  linear(context, block.out_proj, normed, width, rows, x, width, /*add=*/true);
  layer_norm_rows(context, block.ln_2, x, patches_, config_.vision_width, normed);
  linear(context, block.c_fc, normed, width, rows, wide, mlp);
  context.rows(patches_, mlp, [&](int64_t i, int) { context.kernels.gelu(wide + i * mlp, mlp); });
  linear(context, block.c_proj, wide, mlp, rows, x, width, /*add=*/true);
}

}  // namespace qvl::cpu
