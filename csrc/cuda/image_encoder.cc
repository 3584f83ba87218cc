#include "cuda/image_encoder.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/config.h"
#include "core/error.h"

namespace qvl::cuda {
namespace {

constexpr float kEpsilon = 1e-6f;  // of all LayerNorms of the vision stage
// Images per batch, as in backend.cc; more do not increase the utilisation of the GPU.
constexpr int kImageBatch = 8;

const std::string kPool = "visual.attn_pool.";

// Rows first to first + n - 1 of a matrix that is stored in H and has a bias.
Matrix rows_of(const Matrix& matrix, int first, int n) {
  Matrix part = matrix;
  part.out = n;
  part.values = static_cast<char*>(matrix.values) + to_size(first) * to_size(matrix.stride) * 2;
  part.bias += first;
  return part;
}

}  // namespace

ImageEncoder::ImageEncoder(const Gpu& gpu, CUstream stream, const qvl_config& config, Weights& weights)
    : gpu_(gpu),
      config_(config),
      patches_(patches(config)),
      conv1_(weights.matrix("visual.conv1.weight")),
      positions_(weights.floats("visual.positional_embedding")),
      ln_pre_(weights.norm("visual.ln_pre")),
      has_kv_proj_(config.vision_width != config.hidden) {
  const int head_dim = config.vision_width / config.vision_heads;
  QVL_REQUIRE(config.vision_width % 8 == 0 && config.vision_mlp_width % 8 == 0 && config.hidden % 8 == 0,
              QVL_UNSUPPORTED,
              "config: hidden, vision_width and vision_mlp_width must be multiples of 8 on a GPU");
  QVL_REQUIRE(head_dim % 8 == 0 && head_dim <= 128, QVL_UNSUPPORTED,
              "config: vision_width / vision_heads is %d; a GPU needs a multiple of 8, up to 128", head_dim);
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
  const int hidden = config.hidden, n = config.n_queries;
  if (has_kv_proj_) kv_proj_ = weights.matrix(kPool + "kv_proj.weight");
  ln_kv_ = weights.norm(kPool + "ln_kv");
  key_positions_ = weights.floats(kPool + "key_pos_embed");
  const Matrix in_proj = weights.half_matrix(kPool + "attn.in_proj_weight", kPool + "attn.in_proj_bias");
  key_ = rows_of(in_proj, hidden, hidden);
  value_ = rows_of(in_proj, 2 * hidden, hidden);
  out_proj_ = weights.linear(kPool + "attn.out_proj");
  ln_post_ = weights.norm("visual.ln_post");
  proj_ = weights.matrix("visual.proj");

  const uint64_t rows = kImageBatch * to_size(std::max(patches_, n)), width = to_size(config.vision_width),
                 out_width = to_size(hidden);
  x_ = DeviceMemory(rows * std::max(width, out_width) * 4);
  normed_ = DeviceMemory(rows * std::max(width, out_width) * 2);
  qkv_ = DeviceMemory(rows * std::max(3 * width, out_width) * 2);
  wide_ = DeviceMemory(rows *
                       std::max({to_size(conv1_.stride), to_size(config.vision_mlp_width), out_width}) * 2);
  keys_ = DeviceMemory(rows * out_width * 2);
  values_ = DeviceMemory(rows * out_width * 2);
  uint64_t scratch = 0;  // key_ and value_, of H, need none
  for (const Matrix* matrix : {&conv1_, &kv_proj_, &out_proj_, &proj_}) {
    if (matrix->values != nullptr) scratch = std::max(scratch, linear_prompt_scratch(*matrix));
  }
  for (const Block& block : blocks_) {
    for (const Matrix* matrix : {&block.in_proj, &block.out_proj, &block.c_fc, &block.c_proj}) {
      scratch = std::max(scratch, linear_prompt_scratch(*matrix));
    }
  }
  scratch_ = DeviceMemory(scratch);

  // The queries are the same for every image.
  queries_ = DeviceMemory(to_size(n) * out_width * 2);
  const Norm ln_q = weights.norm(kPool + "ln_q");
  layer_norm(gpu, stream, weights.floats(kPool + "query"), ln_q.weight, ln_q.bias, kEpsilon, n, hidden,
             weights.floats(kPool + "pos_embed"), n, normed_.get(), nullptr);
  product(stream, rows_of(in_proj, 0, hidden), normed_.get(), hidden, n, Epilogue::kHalf, queries_.get());
}

void ImageEncoder::product(CUstream stream, const Matrix& matrix, const void* x, int64_t x_stride, int64_t n,
                           Epilogue epilogue, void* y) {
  linear_prompt(gpu_, stream, matrix, x, x_stride, static_cast<int>(n), epilogue, y, scratch_.get());
}

void ImageEncoder::encode(CUstream stream, int64_t n, const float* images, float* features) {
  const int64_t image = int64_t{3} * config_.image_size * config_.image_size;  // values
  const int64_t feature = int64_t{config_.n_queries} * config_.hidden;         // values
  for (int64_t done = 0; done < n; done += kImageBatch) {
    const auto count = static_cast<int>(std::min<int64_t>(kImageBatch, n - done));
    tower(stream, count, images + done * image);
    resample(stream, count, features + done * feature);
  }
}

// Writes the patch features to x_, float32 [n * patches, vision_width]; resample() reads them there.
void ImageEncoder::tower(CUstream stream, int n, const float* images) {
  const int width = config_.vision_width, head_dim = width / config_.vision_heads, rows = n * patches_;
  auto* x = x_.get<float>();
  cut_patches(gpu_, stream, images, n, config_.image_size, config_.patch_size, conv1_.stride, wide_.get());
  product(stream, conv1_, wide_.get(), conv1_.stride, rows, Epilogue::kFloat, x);
  add_rows(gpu_, stream, x, positions_, rows, width, patches_);
  layer_norm(gpu_, stream, x, ln_pre_.weight, ln_pre_.bias, kEpsilon, rows, width, nullptr, 1, nullptr, x);
  // Query, key and value of a head are adjacent: [heads][3][head_dim].
  DenseAttention attention{};
  attention.q = qkv_.get();
  attention.k = qkv_.get<char>() + to_size(head_dim) * 2;
  attention.v = qkv_.get<char>() + to_size(head_dim) * 4;
  attention.q_image = attention.kv_image = int64_t{patches_} * 3 * width;
  attention.q_stride = attention.kv_stride = int64_t{3} * width;
  attention.q_head = attention.kv_head = int64_t{3} * head_dim;
  attention.images = n;
  attention.n_queries = attention.n_keys = patches_;
  attention.heads = config_.vision_heads;
  attention.head_dim = head_dim;
  attention.scale = 1 / std::sqrt(static_cast<float>(head_dim));
  for (const Block& block : blocks_) {
    layer_norm(gpu_, stream, x, block.ln_1.weight, block.ln_1.bias, kEpsilon, rows, width, nullptr, 1,
               normed_.get(), nullptr);
    product(stream, block.in_proj, normed_.get(), width, rows, Epilogue::kHalf, qkv_.get());
    attention_dense(gpu_, stream, attention, normed_.get());
    product(stream, block.out_proj, normed_.get(), width, rows, Epilogue::kAdd, x);
    layer_norm(gpu_, stream, x, block.ln_2.weight, block.ln_2.bias, kEpsilon, rows, width, nullptr, 1,
               normed_.get(), nullptr);
    product(stream, block.c_fc, normed_.get(), width, rows, Epilogue::kGelu, wide_.get());
    product(stream, block.c_proj, wide_.get(), config_.vision_mlp_width, rows, Epilogue::kAdd, x);
  }
}

// Computes image features from the patch features in x_.
void ImageEncoder::resample(CUstream stream, int n, float* features) {
  const int hidden = config_.hidden, n_queries = config_.n_queries, rows = n * patches_;
  auto* x = x_.get<float>();
  if (has_kv_proj_) {
    to_half(gpu_, stream, x, int64_t{rows} * config_.vision_width, normed_.get());
    product(stream, kv_proj_, normed_.get(), config_.vision_width, rows, Epilogue::kFloat, x);
  }
  layer_norm(gpu_, stream, x, ln_kv_.weight, ln_kv_.bias, kEpsilon, rows, hidden, key_positions_, patches_,
             normed_.get(), nullptr);
  layer_norm(gpu_, stream, x, ln_kv_.weight, ln_kv_.bias, kEpsilon, rows, hidden, nullptr, 1, wide_.get(),
             nullptr);
  product(stream, key_, normed_.get(), hidden, rows, Epilogue::kHalf, keys_.get());
  product(stream, value_, wide_.get(), hidden, rows, Epilogue::kHalf, values_.get());

  DenseAttention attention{};
  attention.q = queries_.get();
  attention.k = keys_.get();
  attention.v = values_.get();
  attention.q_image = 0;
  attention.q_stride = hidden;
  attention.q_head = kResamplerHeadDim;
  attention.kv_image = int64_t{patches_} * hidden;
  attention.kv_stride = hidden;
  attention.kv_head = kResamplerHeadDim;
  attention.images = n;
  attention.n_queries = n_queries;
  attention.n_keys = patches_;
  attention.heads = hidden / kResamplerHeadDim;
  attention.head_dim = kResamplerHeadDim;
  attention.scale = 1 / std::sqrt(static_cast<float>(kResamplerHeadDim));
  attention_dense(gpu_, stream, attention, qkv_.get());
  product(stream, out_proj_, qkv_.get(), hidden, int64_t{n} * n_queries, Epilogue::kFloat, x);
  layer_norm(gpu_, stream, x, ln_post_.weight, ln_post_.bias, kEpsilon, n * n_queries, hidden, nullptr, 1,
             normed_.get(), nullptr);
  product(stream, proj_, normed_.get(), hidden, int64_t{n} * n_queries, Epilogue::kFloat, features);
}

}  // namespace qvl::cuda
