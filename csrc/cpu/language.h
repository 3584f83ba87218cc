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

  // A whole batch, in passes of at most config.max_tokens tokens. Logits come for sequences without
  // QVL_SEQUENCE_NO_LOGITS.
  void forward(Context& context, CpuKvPool& pool, const qvl_batch& batch, float* logits);

 private:
  struct Layer {
    const float* ln_1;
    Matrix c_attn, attn_proj;
    const float* ln_2;
    Matrix w1, w2, mlp_proj;
  };

  // Tokens of a sequence that are in a pass, all of its prompt or all generated.
  struct Piece {
    const qvl_sequence* sequence;
    int64_t token;  // in the batch
    int32_t n;
    int32_t past;
    bool generated;
    int32_t logits;     // row of the logits that its last token gives, or -1
    int64_t first = 0;  // row of the pass
  };

  void check_ids(const qvl_batch& batch) const;
  void embed(Context& context, const qvl_batch& batch, const Piece& piece, float* x) const;
  void place(const CpuKvPool& pool, const Piece& piece);
  void pass(Context& context, CpuKvPool& pool, const qvl_batch& batch, std::vector<Piece>& pieces,
            float* logits);
  void attend(Context& context, CpuKvPool& pool, int layer, Rows rows);
  void feed_forward(Context& context, const Layer& layer, Rows rows);

  const qvl_config& config_;
  const void* wte_;
  qvl_dtype wte_dtype_;
  std::vector<Layer> layers_;
  const float* ln_f_;
  Matrix lm_head_;

  // Of a pass: hidden states, normed ones, queries with keys and values, what attention gives, gate and
  // value.
  Buffer x_, normed_, qkv_, mixed_, gate_, up_;
  // Of its rows: angles, factor of the query, block and slot in the pool; and the work of attention.
  std::vector<float> cos_, sin_, query_scale_;
  std::vector<int32_t> block_, slot_;
  std::vector<Queries> prompt_work_, decode_work_;
};

}  // namespace qvl::cpu
