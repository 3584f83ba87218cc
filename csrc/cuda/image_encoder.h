// The vision tower and the resampler on the GPU.
#pragma once

#include <vector>

#include "cuda/weights.h"

namespace qvl::cuda {

class ImageEncoder {
 public:
  ImageEncoder(const Gpu& gpu, CUstream stream, const qvl_config& config, Weights& weights);

  // Encode images float32 [n, 3, size, size] -> features float32 [n, n_queries, hidden], both in memory that
  // the GPU can access.
  void encode(CUstream stream, int64_t n, const float* images, float* features);

 private:
  struct Block {
    Norm ln_1, ln_2;
    Matrix in_proj, out_proj, c_fc, c_proj;
  };

  // The vision tower and the resampler, for a batch of up to 8 images (kImageBatch in image_encoder.cc).
  void tower(CUstream stream, int n, const float* images);
  void resample(CUstream stream, int n, float* features);
  // linear_prompt (ops.h) with scratch_: x has n rows of values of H, x_stride values apart.
  void product(CUstream stream, const Matrix& matrix, const void* x, int64_t x_stride, int64_t n,
               Epilogue epilogue, void* y);

  const Gpu& gpu_;
  const qvl_config config_;
  const int patches_;
  Matrix conv1_;
  const float* positions_;
  Norm ln_pre_;
  std::vector<Block> blocks_;

  // Of the resampler. kv_proj_ exists only if the widths of vision tower and language model differ.
  bool has_kv_proj_;
  Matrix kv_proj_, key_, value_, out_proj_, proj_;
  Norm ln_kv_, ln_post_;
  const float* key_positions_;
  DeviceMemory queries_;  // the projected queries, H [n_queries, hidden], the same for every image

  // Scratch memory: activations of a batch. x_: the residual stream of the tower, finally the patch features,
  // then float32 activations of the resampler; normed_: inputs of products, in H; qkv_: queries, keys and
  // values of the tower, and the output of the resampler's attention; wide_: inputs of conv1_, c_proj and
  // value_; keys_, values_: of the resampler; scratch_: of linear_prompt.
  DeviceMemory x_, normed_, qkv_, wide_, keys_, values_, scratch_;
};

}  // namespace qvl::cuda
