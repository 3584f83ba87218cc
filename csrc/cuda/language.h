// The language model's layers on the GPU.
#pragma once

#include <memory>
#include <vector>

#include "core/passes.h"
#include "cuda/angles.h"
#include "cuda/kv_pool.h"
#include "cuda/low_rank.h"
#include "cuda/step_input.h"
#include "cuda/weights.h"

namespace qvl::cuda {

// Shape of a pass: prompt rows first, then decode rows.
struct PassShape {
  int n_prompt = 0, n_decode = 0;
  int tiles = 0;            // query tiles of the prompts
  int max_blocks = 0;       // length of the longest block table
  int max_keys = 0;         // maximum number of keys of a decode row
  bool is_step = false;     // one row per sequence, for attention_step
  bool is_adapted = false;  // at least one row has an adapter

  int rows() const { return n_prompt + n_decode; }
};

class Language {
 public:
  Language(const Gpu& gpu, const qvl_config& config, Weights& weights);

  // Run the batch; logits float32 [rows, vocab] in device memory, as in qvl_forward, or NULL.
  void forward(CUstream stream, const CudaKvPool& pool, const qvl_batch& batch, float* logits,
               StepInput& input);

  // Enqueue the layers for the rows described in device memory.
  void layers(CUstream stream, const CudaKvPool& pool, const InputArrays& at, const PassShape& shape);

  // Enqueue lm_head for rows [first, first + n).
  void head(CUstream stream, const InputArrays& at, int first, int n, float* logits);

  // Copy an adapter's matrices to the GPU, and reserve scratch memory for it.
  std::unique_ptr<CudaAdapter> make_adapter(CUstream stream, const std::vector<AdapterMatrix>& matrices);

  // Write the description of row i: a token at `position` of the sequence whose block table is row `table`.
  void place(const InputArrays& at, int i, const qvl_sequence& sequence, int32_t position, int table) const;

  // If any row of the pass has an adapter, sort the n decode rows from `first` on by adapter.
  static void sort_by_adapter(const InputArrays& at, int first, int n);

  // Reserve scratch memory for `rows` decode rows with up to max_keys keys. A captured graph stays valid
  // while moved() is unchanged.
  void reserve(int rows, int max_keys);
  int moved() const { return moved_; }

 private:
  struct Layer {
    const float *ln_1, *ln_2;
    Matrix c_attn, attn_proj, gate_up, mlp_proj;
  };
  void pass(CUstream stream, const CudaKvPool& pool, const qvl_batch& batch, std::vector<Part>& parts,
            float* logits, StepInput& input);
  void take_features(CUstream stream, const qvl_batch& batch, const Part& part, const InputArrays& host);
  void attention(CUstream stream, const Places& places, const InputArrays& at, const PassShape& shape,
                 const KvLayer& kv);
  // Compute a product with its adapters. `number`: index of the product in an adapter.
  void product(CUstream stream, int number, const Matrix& matrix, const void* x, int x_stride,
               const InputArrays& at, const PassShape& shape, Into into, void* y);
  // Permute the columns of x to the matrix's input order; return the result and set its stride.
  const void* ordered(CUstream stream, const Matrix& matrix, const void* x, int& x_stride, int n);

  const Gpu& gpu_;
  const qvl_config config_;
  AngleTables angles_;
  Matrix wte_, lm_head_;
  const float* ln_f_;
  std::vector<Layer> layers_;
  // Scratch memory: activations of a pass.
  DeviceMemory x_, normed_, qkv_, q_, mixed_, wide_, features_, prompt_scratch_, decode_scratch_, ordered_;
  // Scratch memory for adapters: A x in rows of max_rank_, and products before their epilogues.
  DeviceMemory low_, raw_;
  int max_rank_ = 0;
  std::vector<bool> products_adapted_;  // whether any loaded adapter changes the product
  // Prompt rows of the pass with an adapter.
  struct AdaptedPrompt {
    const CudaAdapter* adapter;
    int first, n;
  };
  std::vector<AdaptedPrompt> adapted_prompts_;
  int moved_ = 0;
};

}  // namespace qvl::cuda
