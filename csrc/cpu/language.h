// The language model: packed tokens -> logits, keys and values in the pool.
#pragma once

#include <vector>

#include "cpu/context.h"
#include "cpu/kv_pool.h"
#include "cpu/weights.h"

namespace qvl::cpu {

class Language {
 public:
  Language(const qvl_config& config, Weights& weights);

  // A whole batch, in passes of at most config.max_tokens tokens.
  void forward(Context& context, CpuKvPool& pool, const qvl_batch& batch, float* logits);

 private:
  struct Layer {
    const float* ln_1;
    Matrix c_attn, attn_proj;
    const float* ln_2;
    Matrix w1, w2, mlp_proj;
  };

  // The part of a sequence that is in a pass.
  struct Piece {
    int32_t sequence;
    int64_t first;  // row of the pass
    int32_t n;
    int32_t past;
    bool last;  // of its sequence in this batch
  };

  void check_ids(const qvl_batch& batch) const;
  void embed(Context& context, const qvl_batch& batch, int64_t first_token, int64_t n, float* x) const;
  void place(const qvl_batch& batch, const std::vector<Piece>& pieces);
  void pass(Context& context, CpuKvPool& pool, const qvl_batch& batch, const std::vector<Piece>& pieces,
            int64_t first_token, int64_t n, float* logits);
  void attend(Context& context, CpuKvPool& pool, const qvl_batch& batch, const std::vector<Piece>& pieces,
              int layer, int64_t n);
  void feed_forward(Context& context, const Layer& layer, int64_t n);

  const qvl_config& config_;
  const void* wte_;
  qvl_dtype wte_dtype_;
  std::vector<Layer> layers_;
  const float* ln_f_;
  Matrix lm_head_;

  // Of a pass: hidden states, normed ones, queries with keys and values, what attention gives, gate and
  // value.
  Buffer x_, normed_, qkv_, mixed_, gate_, up_;
  // Of its tokens: angles, factor of the query, block and slot in the pool.
  std::vector<float> cos_, sin_, query_scale_;
  std::vector<int32_t> block_, slot_;
};

}  // namespace qvl::cpu
