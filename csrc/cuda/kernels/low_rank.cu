// Low-rank adapters (LoRA), y = f(W x + B (A x)), for decode rows, each with its own adapter or none. f is
// the epilogue; the product of the base weight omits it and writes raw = W x, for decode rows and prompts.
//
// Layout. A block has 16 rows of x, the 16 rows of mma.m16n8k16, sorted by adapter into runs with the same
// adapter. A run's products are computed for all 16 rows, with zeros for the rows of other runs, and stored
// only for the rows of the run:
//
//   low_rank_down   blocks (8 rows of A, 16 rows of x, runs)    x -> low H [n][rank], see low_rank.cuh; on
//                   Hopper the kernel of the base weight's product computes `low` instead
//   low_rank_up     blocks (64 rows of B, 16 rows of x)         low, raw float32 [n][out] -> y
//                   8 rows of B per warp, a tile of sums in shared memory, then two columns per thread
//   finish_raw      for prompts: products as for any weight have added B (A x) to raw [n][out]; raw -> y
//
// Cost. Bytes: A and B once per adapter: (in + out) * rank values, 2 MB for rank 64 of a 4096 x 12288
// product, compared with 24 to 96 MiB of base weights (4 to 16 bits). The kernels are latency-bound. They
// therefore read A, B and the tables before the preceding kernels end, which write only x, low and raw.
//
// The sums of a row depend only on the row and its adapter, since the steps and their order are the same in
// every batch. The result of a row without an adapter has the same bits as in a batch without adapters.
//
// Reference: float64 in PyTorch, tests/cuda/test_low_rank.py.
#include "cuda/kernels/low_rank.h"

#include "cuda/kernels/linear_prompt.cuh"
#include "cuda/kernels/low_rank.cuh"

namespace qvl::cuda {
namespace {

// a, b += columns `column` and column + 1 of raw float32 [n, out]; columns beyond `out` are skipped.
__device__ inline void add_raw(const float* raw, const Result& result, int row, int column, float& a,
                               float& b) {
  const float* const from = raw + static_cast<int64>(row) * result.out + column;
  a += __ldcg(from);
  if (column + 1 < result.out) b += __ldcg(from + 1);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kLowRankDownThreads)
    low_rank_down(const __grid_constant__ LowRankParams p) {
  __shared__ LowRankScratch scratch;
  start_successors();
  compute_low(
      p, scratch, blockIdx.x, blockIdx.y, blockIdx.z, [] { __syncthreads(); },
      [] { wait_for_predecessors(); });
  wait_for_predecessors();  // in all blocks: successors rely on it
}

extern "C" __global__ void __launch_bounds__(kLowRankThreads)
    low_rank_up(const __grid_constant__ LowRankParams p) {
  constexpr int kPrefetchedSteps = 2;  // steps of 32 columns of B, requested one run before their use
  __shared__ Rows rows;
  __shared__ float tile[kLowRankRows][kLowRankUp + 2];
  start_successors();
  read_rows(p, rows, blockIdx.y, [] { __syncthreads(); });
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * kLowRankUp;
  // Column i (0 to 7) of y of this warp. With two interleaved matrices a warp has every other column, so that
  // all of its columns belong to one matrix.
  const auto column = [&](int parts, int i) {
    return parts == 1 ? first + 8 * warp + i : first + warp / 2 * 16 + 2 * i + warp % 2;
  };
  const auto load_b = [&](const LowRankEntry& entry, int step) {
    const int width = entry.rank / entry.parts, k = kStep * step + kVector * t, row = column(entry.parts, g);
    const int64 index = static_cast<int64>(row) * entry.rank + row % entry.parts * width + k;
    return load16(static_cast<const H*>(entry.b) + index, row < p.result.out && k < width);
  };
  // A x of row i of the block.
  const auto load_low = [&](int i, int step) {
    const LowRankEntry& entry = rows.entry[i];
    const int width = entry.rank / entry.parts, k = kStep * step + kVector * t;
    const int64 index =
        static_cast<int64>(rows.row[i]) * p.low_stride + column(entry.parts, 0) % entry.parts * width + k;
    return load16(static_cast<const H*>(p.low) + index, k < width);
  };
  uint4 b[kPrefetchedSteps], next[kPrefetchedSteps], low[kPrefetchedSteps], high[kPrefetchedSteps];
#pragma unroll
  for (int step = 0; step < kPrefetchedSteps; ++step) b[step] = load_b(rows.entry[0], step);
  wait_for_predecessors();
#pragma unroll
  for (int step = 0; step < kPrefetchedSteps; ++step) {
    low[step] = load_low(g, step);
    high[step] = load_low(g + 8, step);
  }
  // raw of this thread's columns of y, requested before the products.
  constexpr int kPairs = kLowRankRows * kLowRankUp / 2 / kLowRankThreads;
  float2 raw_sums[kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int i = threadIdx.x + pair * kLowRankThreads, row = rows.row[i / (kLowRankUp / 2)];
    const int y_column = first + i % (kLowRankUp / 2) * 2;
    raw_sums[pair] = make_float2(0, 0);
    if (p.raw != nullptr && row >= 0 && y_column < p.result.out)
      add_raw(p.raw, p.result, row, y_column, raw_sums[pair].x, raw_sums[pair].y);
  }

  // Compute a run's products for all rows; store those of the run's rows. The loop is not unrolled: in a
  // kernel of a few microseconds the time to fetch the code matters.
#pragma unroll 1
  for (int run = 0; run < rows.n_runs; ++run) {
    const int begin = rows.begin[run], end = rows.begin[run + 1];
    if (run + 1 < rows.n_runs) {
#pragma unroll
      for (int step = 0; step < kPrefetchedSteps; ++step) next[step] = load_b(rows.entry[end], step);
    }
    const LowRankEntry& entry = rows.entry[begin];
    const bool low_valid = g >= begin && g < end, high_valid = g + 8 >= begin && g + 8 < end;
    float sums[4] = {};
#pragma unroll
    for (int step = 0; step < kPrefetchedSteps; ++step)
      multiply_step(sums, keep_if(low_valid, low[step]), keep_if(high_valid, high[step]), b[step]);
#pragma unroll 1
    for (int step = kPrefetchedSteps; kStep * step < entry.rank / entry.parts; ++step) {
      multiply_step(sums, keep_if(low_valid, load_low(g, step)), keep_if(high_valid, load_low(g + 8, step)),
                    load_b(entry, step));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int local_column = column(entry.parts, 2 * t + i) - first;
      if (low_valid) tile[g][local_column] = sums[i];
      if (high_valid) tile[g + 8][local_column] = sums[2 + i];
    }
#pragma unroll
    for (int step = 0; step < kPrefetchedSteps; ++step) b[step] = next[step];
  }
  __syncthreads();

#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int i = threadIdx.x + pair * kLowRankThreads, block_row = i / (kLowRankUp / 2);
    const int local_column = i % (kLowRankUp / 2) * 2, row = rows.row[block_row];
    if (row < 0 || first + local_column >= p.result.out) continue;
    finish_pair(p.result, row, first + local_column, tile[block_row][local_column] + raw_sums[pair].x,
                tile[block_row][local_column + 1] + raw_sums[pair].y);
  }
}

extern "C" __global__ void __launch_bounds__(kFinishThreads)
    finish_raw(const __grid_constant__ FinishParams p) {
  start_successors();
  wait_for_predecessors();
  const int column = 2 * (blockIdx.x * kFinishThreads + threadIdx.x), row = blockIdx.y;
  if (column >= p.result.out) return;
  float a = 0, b = 0;
  add_raw(p.raw, p.result, row, column, a, b);
  finish_pair(p.result, row, column, a, b);
}

}  // namespace qvl::cuda
