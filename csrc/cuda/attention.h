// Attention over many queries with a selectable kernel, for the tests.
#pragma once

#include "cuda/ops.h"

namespace qvl::cuda {

// As attention_prompt and attention_dense of ops.h, which call these. portable: use the kernels for any GPU
// even if this GPU has faster ones.
void attention_prompt_with(const Gpu&, CUstream, bool portable, const void* q, const PromptChunk* chunks,
                           const Tile* tiles, int n_tiles, const int32_t* blocks, int max_blocks,
                           const KvLayer&, void* y);
void attention_dense_with(const Gpu&, CUstream, bool portable, const DenseAttention&, void* y);

}  // namespace qvl::cuda
