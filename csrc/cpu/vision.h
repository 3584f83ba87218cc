// The vision stage on the CPU: the vision tower, a ViT without class token, image -> patch features; and the
// resampler (resampler.h), patch features -> image features.
#pragma once

#include <vector>

#include "cpu/context.h"
#include "cpu/resampler.h"
#include "cpu/weights.h"

namespace qvl::cpu {

class Vision {
 public:
  Vision(const qvl_config& config, Weights& weights, Context& context);

  // Encode one image, float32 [3, image_size, image_size] -> features [n_queries, hidden].
  void encode(Context& context, const float* image, float* features);

 private:
  struct Block {
    Norm ln_1;
    Matrix in_proj, out_proj;
    Norm ln_2;
    Matrix c_fc, c_proj;
  };

  // Copy an image, as for encode(), to patches [patches][3][patch_size][patch_size].
  void cut_patches(Context& context, const float* image, float* to) const;
  // Apply one block of the ViT to x [patches][vision_width], in place.
  void run_block(Context& context, const Block& block, float* x);

  const qvl_config& config_;
  int64_t patches_;
  Matrix conv1_;
  const float* positions_;
  Norm ln_pre_;
  std::vector<Block> blocks_;
  Resampler resampler_;
  // Activations: residual stream, normed input or output of attention, q with k and v, and patches or output
  // of c_fc.
  Buffer x_, normed_, qkv_, wide_;
};

// LayerNorm of n rows x [n][width] -> y, which may be the same memory as x.
void layer_norm_rows(Context& context, const Norm& norm, const float* x, int64_t n, int width, float* y);

// Epsilon of all LayerNorms of the vision stage.
constexpr float kVisionEpsilon = 1e-6F;

}  // namespace qvl::cpu
