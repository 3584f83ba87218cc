// Launches of kernels/low_rank.cu: y += B (A x), for rows that each have a low-rank adapter (LoRA) or none. B
// has been multiplied by the adapter's scale.
#pragma once

#include "cuda/ops.h"

namespace qvl::cuda {

// Decode rows and their adapters; the arrays are in device memory. Kernels read the arrays before their
// predecessors have ended: the writers of the arrays must have ended before the first of a chain of early
// launches began.
struct AdaptedRows {
  const uint64_t* adapters;  // [n]: addresses of the adapter tables of the rows in `order`; 0: no adapter
  const int32_t* order;      // [n]: row indices sorted by adapter; NULL: 0 1 2 ..
  int n;                     // number of rows
  int product;               // index of the product in the adapter tables
};

// Memory of low_rank_down and low_rank_up for up to `rows` rows.
struct LowRankMemory {
  void* low;      // H [rows, stride]: A x
  void* scratch;  // low_rank_scratch(rows, stride) bytes, zero before the first launch
  int rows;
  int stride;  // a multiple of 8, at least the highest rank
};
uint64_t low_rank_scratch(int rows, int stride);

// memory.low = A x, for each row with its adapter: x H [n, x_stride], of which `in` values per row are used.
// Rows without an adapter are not written. rank: the highest rank of any adapter for this product.
// x_is_complete: the preceding kernel is linear_decode with low_rank_next on Hopper (has_tensor_maps() of
// tensor_map.h), so that x is complete when this kernel starts; it then runs beside its predecessor.
void low_rank_down(const Gpu&, CUstream, const AdaptedRows&, const void* x, int64_t x_stride, int in,
                   int rank, bool x_is_complete, const LowRankMemory& memory);

// y = epilogue(raw + B low), where B low is 0 for a row without an adapter. raw: float32 [n, out], W x; with
// kAdd and kFloat it is NULL, and B low is added to y.
void low_rank_up(const Gpu&, CUstream, const AdaptedRows&, const LowRankMemory&, int out, const float* raw,
                 Epilogue epilogue, void* y);

// y = epilogue(raw), for rows of prompts; raw: float32 [n, out], W x plus the updates, which linear_prompt()
// has added.
void finish_raw(const Gpu&, CUstream, const float* raw, int n, int out, Epilogue epilogue, void* y);

}  // namespace qvl::cuda
