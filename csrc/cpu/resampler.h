// The resampler on the CPU: cross-attention of learned queries over an image's patches.
#pragma once

#include "cpu/context.h"
#include "cpu/weights.h"

namespace qvl::cpu {

class Resampler {
 public:
  Resampler(const qvl_config& config, Weights& weights, Context& context);

  // Patch features of an image [patches][vision_width] -> image features [n_queries][hidden].
  void run(Context& context, const float* hidden_states, float* features);

 private:
  const qvl_config& config_;
  bool has_kv_proj_;  // whether vision_width differs from hidden
  Matrix kv_proj_;
  Norm ln_kv_;
  const float* key_positions_;
  Matrix key_, value_, out_proj_;
  Norm ln_post_;
  Matrix proj_;
  Buffer queries_;  // the learned queries, projected and scaled; the same for every image
  Buffer kv_, keys_, values_, key_input_, mixed_, out_;
};

}  // namespace qvl::cpu
