// The language model's layers on the GPU.
#pragma once

#include <memory>
#include <vector>

#include "core/passes.h"
#include "cuda/adapter.h"
#include "cuda/angles.h"
#include "cuda/kv_pool.h"
#include "cuda/step_input.h"
#include "cuda/weights.h"

namespace qvl::cuda {

// Shape of a pass over the layers. A row is a token; the rows of prompts come first, then the decode rows.
struct PassShape {
  int n_prompt = 0, n_decode = 0;
  int tiles = 0;            // query tiles of the prompts
  int max_blocks = 0;       // length of a row of inputs.blocks: blocks for the keys of every sequence
  int max_keys = 0;         // at least the number of keys of every decode row
  bool is_step = false;     // of StepGraphs: one decode row per sequence, for attention_step
  bool is_adapted = false;  // at least one row has an adapter

  int rows() const { return n_prompt + n_decode; }
};

class Language {
 public:
  Language(const Gpu& gpu, const qvl_config& config, Weights& weights);

  // Run the batch in one or several passes. logits: float32, in memory that the GPU can access, with the
  // layout of qvl_forward, or NULL.
  void forward(CUstream stream, const CudaKvPool& pool, const qvl_batch& batch, float* logits,
               StepInput& input);

  // Enqueue the layers for the rows that `inputs`, in device memory, describes.
  void layers(CUstream stream, const CudaKvPool& pool, const InputArrays& inputs, const PassShape& shape);

  // Enqueue the final norm and lm_head for rows first to first + n - 1 of the pass.
  void lm_head(CUstream stream, const InputArrays& inputs, int first, int n, float* logits);

  // Copy an adapter's matrices to the GPU, and reserve scratch memory for it.
  std::unique_ptr<CudaAdapter> make_adapter(CUstream stream, const std::vector<AdapterMatrix>& matrices);

  // Write all inputs of row i but its id and block table; the row gets no image features (set_features() adds
  // them). The row is the token at `position` of `sequence`, whose block table is row `table` of
  // inputs.blocks.
  void describe_row(const InputArrays& inputs, int i, const qvl_sequence& sequence, int32_t position,
                    int table) const;

  // If any row of the pass has an adapter, set inputs.adapter_order and sorted_adapters for the n decode
  // rows, of which the first is row `first` of the pass.
  static void sort_by_adapter(const InputArrays& inputs, int first, int n);

  // Reserve scratch memory for `rows` decode rows with up to max_keys keys. A captured graph (StepGraphs)
  // stays valid while graph_version() is unchanged. graph_version() changes when scratch memory moves, and
  // when a new adapter has a higher rank for a product than all earlier adapters.
  void reserve(int rows, int max_keys);
  int graph_version() const { return graph_version_; }

 private:
  struct Layer {
    const float *ln_1, *ln_2;
    Matrix c_attn, attn_proj, gate_up, mlp_proj;
  };
  // Run one pass: describe its rows, then layers() and lm_head().
  void pass(CUstream stream, const CudaKvPool& pool, const qvl_batch& batch, std::vector<Part>& parts,
            float* logits, StepInput& input);
  // Set the addresses of image features of the part's rows, and the ids of these rows, which are not checked,
  // to 0; copy features that are in pageable memory to the GPU.
  void set_features(CUstream stream, const qvl_batch& batch, const Part& part, const InputArrays& host);
  void attention(CUstream stream, const RowMetadata& metadata, const InputArrays& inputs,
                 const PassShape& shape, const KvLayer& kv);
  // Compute a product, with the adapters of the rows. `number`: index of the product, as for
  // CudaAdapter::product().
  void product(CUstream stream, int number, const Matrix& matrix, const void* x, int x_stride,
               const InputArrays& inputs, const PassShape& shape, Epilogue epilogue, void* y);
  // Permute the columns of x to the input order of the matrix; return the result and set x_stride to its
  // stride. Returns x if the matrix has no input order.
  const void* permuted(CUstream stream, const Matrix& matrix, const void* x, int& x_stride, int n);

  const Gpu& gpu_;
  const qvl_config config_;
  AngleTables angles_;
  Matrix wte_, lm_head_;
  const float* ln_f_;
  std::vector<Layer> layers_;
  // Scratch memory: activations of a pass. attended_: output of attention; mlp_: inputs of mlp_proj.
  DeviceMemory x_, normed_, qkv_, q_, attended_, mlp_, features_, prompt_scratch_, decode_scratch_,
      permuted_x_;
  // Scratch memory for adapters: low_: A x in rows of max_rank_ values (prompts: of the rank of the adapter's
  // update of the product); low_scratch_: of low_rank_down; raw_: products before their epilogues.
  DeviceMemory low_, low_scratch_, raw_;
  int max_rank_ = 0;
  // Of each product, the highest rank of the adapters created so far; 0: none changes the product.
  std::vector<int> product_ranks_;
  // Rows first to first + n - 1 of the pass, a chunk of a prompt with an adapter.
  struct AdaptedPrompt {
    const CudaAdapter* adapter;
    int first, n;
  };
  std::vector<AdaptedPrompt> adapted_prompts_;
  int graph_version_ = 0;
};

}  // namespace qvl::cuda
