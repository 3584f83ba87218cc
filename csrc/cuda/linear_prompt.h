// Variants of linear_prompt's kernel, for linear_prompt.cc and for tests (testing/cuda_prompt.cc); other code
// calls linear_prompt of ops.h, which chooses the variant. A variant is a size of tiles and clusters
// (kernels/linear_prompt_tiles.h); the results of all variants are bit-identical. Other GPUs use the portable
// kernel, whose results may differ from those of the variants by rounding; tests run it on Hopper, too.
#pragma once

#include "cuda/ops.h"

namespace qvl::cuda {

// Number of variants for this GPU, 0 except on Hopper. Their indices begin at 0; -1 is the portable kernel.
int linear_prompt_tiles(const Gpu&);
const char* linear_prompt_tile_name(int tile);

// Index of the variant that linear_prompt chooses for `n` tokens; -1 if this GPU has none.
int linear_prompt_tile(const Gpu&, int out, int in, int n);

// linear_prompt with a kHalf matrix and the variant `tile`, or -1.
void linear_prompt_with(const Gpu&, CUstream, int tile, const Matrix&, const void* x, int64_t x_stride, int n,
                        Epilogue, void* y);

}  // namespace qvl::cuda
