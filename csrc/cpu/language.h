// The language model on the CPU: tokens -> logits, with keys and values written to the pool.
#pragma once

#include <vector>

#include "core/passes.h"
#include "cpu/adapter.h"
#include "cpu/context.h"
#include "cpu/kv_pool.h"
#include "cpu/weights.h"

namespace qvl::cpu {

class Language {
 public:
  Language(const qvl_config& config, Weights& weights);

  // Run a batch in passes of at most config.max_tokens tokens. logits [rows, vocab]: a row per sequence
  // without QVL_SEQUENCE_NO_LOGITS; NULL: compute none.
  void forward(Context& context, CpuKvPool& pool, const qvl_batch& batch, float* logits);

 private:
  struct Layer {
    const float* ln_1;
    Matrix c_attn, attn_proj;
    const float* ln_2;
    Matrix w1, w2, mlp_proj;
  };

  // Write the part's rows of x: embeddings of its tokens, or features of images.
  void embed(Context& context, const qvl_batch& batch, const Part& part, float* x) const;
  // Append the part's rows and work items to the vectors at the end of this class.
  void add_rows(const CpuKvPool& pool, const Part& part);
  // Compute the parts, which make up one pass; `logits` as for forward().
  void pass(Context& context, CpuKvPool& pool, const qvl_batch& batch, std::vector<Part>& parts,
            float* logits);
  void attend(Context& context, CpuKvPool& pool, int layer, Rows rows);
  void feed_forward(Context& context, int layer, Rows rows);
  // linear() with `matrix`, which is the given target of the layer, then the updates of the rows' adapters.
  void product(Context& context, int layer, LayerTarget target, const Matrix& matrix, const float* x,
               int64_t x_stride, Rows rows, float* y, int64_t y_stride, bool add = false);

  const qvl_config& config_;
  const void* wte_;
  qvl_dtype wte_dtype_;
  std::vector<Layer> layers_;
  const float* ln_f_;
  Matrix lm_head_;

  // Activations of a pass: residual stream, normed input, q with k and v, output of attention, gate and up.
  Buffer x_, normed_, qkv_, mixed_, gate_, up_;
  std::vector<AdapterRows> adapter_rows_;  // rows with an adapter: of the pass, finally of lm_head
  Buffer low_rank_;                        // scratch memory of add_low_rank()
  // For each row of the pass: rotary cosines and sines, query scale, block and slot in the pool. Work items
  // of attention.
  std::vector<float> cos_, sin_, query_scale_;
  std::vector<int32_t> block_, slot_;
  std::vector<Queries> prompt_work_, decode_work_;
};

}  // namespace qvl::cpu
