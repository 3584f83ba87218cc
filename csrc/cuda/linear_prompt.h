// The tiles of linear_prompt, for its tests and timings. All give the same bits.
#pragma once

#include "cuda/ops.h"

namespace qvl::cuda {

// How many tiles this GPU can choose from: numbers 0 to n - 1. Number -1 is the portable kernel.
int linear_prompt_tiles(const Gpu&);
const char* linear_prompt_tile_name(int tile);

// The tile that linear_prompt takes for `n` tokens.
int linear_prompt_tile(const Gpu&, int out, int in, int n);

// linear_prompt of a kHalf matrix with a tile of the caller's choice.
void linear_prompt_with(const Gpu&, CUstream, int tile, const Matrix&, const void* x, int64_t x_stride, int n,
                        Into, void* y);

}  // namespace qvl::cuda
