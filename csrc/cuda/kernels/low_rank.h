// Parameters of the kernels in low_rank.cu, for host and device: low_rank_down and low_rank_up for decode
// rows and the rows of lm_head, finish_raw for prompts. H: the compute type, bfloat16 or float16. A run:
// consecutive rows of a block, in the order of LowRankParams::order, with the same adapter.
#pragma once

#include "cuda/kernels/linear_prompt.h"

namespace qvl::cuda {

// A and B of a product: y += B (A x). If the product's weight consists of two interleaved matrices, A
// contains the rows of the first matrix's A, then those of the second's, and row i of B belongs to matrix i %
// parts; it is zero in the columns of the other matrix's A.
struct LowRankEntry {
  const void* a;  // H [rank, in]
  const void* b;  // H [out, rank], multiplied by the adapter's scale
  int rank;       // a multiple of 8; 0: the adapter does not change the product
  int parts;      // number of interleaved matrices, 1 or 2; rank / parts is a multiple of 8
};

constexpr int kLowRankThreads = 128;     // per block of low_rank_up
constexpr int kLowRankDownThreads = 96;  // per block of low_rank_down
constexpr int kLowRankRows = 16;         // rows of x per block
constexpr int kLowRankDown = 16;         // rows of A per block of low_rank_down
constexpr int kLowRankSlices = 8;        // of k
constexpr int kLowRankRuns = 4;          // runs that low_rank_down computes concurrently
// Up to this number of blocks, about one per multiprocessor, each block of low_rank_down has one slice;
// beyond it, half as many have kLowRankMaxSlices.
constexpr int kLowRankOneSlice = 128;
constexpr int kLowRankMaxSlices = 2;
constexpr int kLowRankUp = 32;  // rows of B per block of low_rank_up

struct LowRankParams {
  // [n]: address of the table [products] of LowRankEntry of the row order[i]; 0: no adapter
  const unsigned long long* adapters;
  const int* order;  // [n]: row indices sorted by adapter; NULL: 0 1 2 ..
  const void* x;     // low_rank_down: H [n, x_stride]
  void* low;         // H [n, low_stride]: A x
  float* slices;     // low_rank_down: scratch [kLowRankSlices, n, low_stride]
  // low_rank_down: numbers of finished slices, [gridDim.y, gridDim.x, groups of runs]. Zero before the kernel
  // and after it.
  int* counters;
  const float* raw;  // low_rank_up: [n, out], W x; may be result.y, which for kAdd includes the former y
  Result result;     // low_rank_up: finishes raw + B A x; without bias
  long long x_stride;
  int block_slices;    // low_rank_down: slices per block, 1 or kLowRankMaxSlices
  int n, product;      // number of rows, and index of the product in the tables
  int in, low_stride;  // multiples of 8
  bool x_is_complete;  // low_rank_down: x may be read before the preceding kernels end
};

// Parameters of finish_raw: raw float32 [result.n, result.out] -> result.
struct FinishParams {
  const float* raw;
  Result result;
};
constexpr int kFinishThreads = 256;

}  // namespace qvl::cuda
