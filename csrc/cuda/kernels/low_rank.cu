// Low-rank adapters (LoRA) of decode rows, each row with its own adapter or none: y = B (A x), which the
// product of the base weight adds before its activation.
//
// Layout. A block has 16 rows of x, sorted by adapter: runs of rows that share one, the 16 rows of
// mma.m16n8k16. A run's products are computed for all 16, zeros in the place of the others, and kept for its
// own:
//
//   low_rank_down   blocks (8 rows of A, 16 rows of x, runs): 16 warps share k in steps of 32; their sums
//   meet in
//                   shared memory in order                                           x -> low H [n][rank]
//   low_rank_up     blocks (64 rows of B, 16 rows of x): 8 rows of B a warp          low -> y float32
//   [n][out]
//
// Cost. Bytes: A and B once for each adapter: (in + out) rank values, at rank 64 of a 4096 x 12288 product 2
// MB, beside 24 to 96 MB of base weights. Latency bounds both kernels: B and the tables are read before the
// predecessors end, which write x and low alone.
//
// A row's sums depend on the row and its adapter alone: the steps and their order are the same in any batch.
//
// Reference: float64 in PyTorch, tests/cuda/test_low_rank.py.
#include "cuda/kernels/common.cuh"
#include "cuda/kernels/low_rank.h"
#include "cuda/kernels/streams.cuh"

namespace qvl::cuda {
namespace {

constexpr int kVector = 8;  // values of H a lane loads at once
constexpr int kStep = 32;   // values of k a warp multiplies at once

// The block's rows of x in runs of the same adapter, or of none.
struct Rows {
  int row[kLowRankRows];  // -1: none
  LowRankEntry entry[kLowRankRows];
  int begin[kLowRankRows + 1];  // of each run
  int n_runs;
};

__device__ inline void read_rows(const LowRankParams& p, Rows& rows) {
  if (threadIdx.x < 32) {
    const int i = threadIdx.x % kLowRankRows, at = blockIdx.y * kLowRankRows + i;
    const int row = at >= p.n ? -1 : p.order != nullptr ? p.order[at] : at;
    const auto* const adapter = reinterpret_cast<const LowRankEntry*>(row < 0 ? 0 : p.adapters[row]);
    const LowRankEntry entry = adapter != nullptr ? adapter[p.product] : LowRankEntry{nullptr, nullptr, 0, 1};
    const uint64 key = reinterpret_cast<uint64>(entry.b);
    const uint64 before = __shfl_up_sync(0xFFFFFFFFu, key, 1);
    const bool starts = threadIdx.x < kLowRankRows && (i == 0 || key != before);
    const uint32 mask = __ballot_sync(0xFFFFFFFFu, starts);
    if (threadIdx.x < kLowRankRows) {
      rows.row[i] = row;
      rows.entry[i] = entry;
      if (starts) rows.begin[__popc(mask & ((1u << i) - 1))] = i;
      if (i == 0) {
        rows.n_runs = __popc(mask);
        rows.begin[rows.n_runs] = kLowRankRows;
      }
    }
  }
  __syncthreads();
}

__device__ inline uint4 load16(const void* from, bool there) {
  return there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
}

// sums [16, 8] += rows g and g + 8 of the left operand times row g of the right one, 8 values of k a lane.
__device__ inline void multiply_step(float (&sums)[4], const uint4& low, const uint4& high,
                                     const uint4& right) {
  multiply(sums, low.x, high.x, low.y, high.y, right.x, right.y);
  multiply(sums, low.z, high.z, low.w, high.w, right.z, right.w);
}

}  // namespace

// 16 warps take 4096 values of k in 8 steps, all loads of which are in flight at once.
extern "C" __global__ void __launch_bounds__(kLowRankDownThreads)
    low_rank_down(const __grid_constant__ LowRankParams p) {
  constexpr int kAtOnce = 8, kWarps = kLowRankDownThreads / 32;
  __shared__ Rows rows;
  __shared__ float parts[kWarps][kLowRankRows][kLowRankDown];
  start_successors();
  read_rows(p, rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * kLowRankDown;  // row of A
  const H* const x = static_cast<const H*>(p.x);
  bool waited = false;
  for (int run = blockIdx.z; run < rows.n_runs; run += gridDim.z) {
    const int begin = rows.begin[run], end = rows.begin[run + 1];
    const LowRankEntry& entry = rows.entry[begin];
    if (first >= entry.rank) continue;
    const H* const a = static_cast<const H*>(entry.a) + static_cast<int64>(first + g) * p.in;
    const bool low_there = g >= begin && g < end, high_there = g + 8 >= begin && g + 8 < end;
    const H* const low = x + (low_there ? rows.row[g] * p.x_stride : 0);
    const H* const high = x + (high_there ? rows.row[g + 8] * p.x_stride : 0);
    float sums[4] = {};
    for (int from = kStep * warp; from < p.in; from += kStep * kWarps * kAtOnce) {
      uint4 left[kAtOnce], right[kAtOnce], weights[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int k = from + i * kStep * kWarps + kVector * t;
        weights[i] = load16(a + k, k < p.in);
      }
      if (!waited) {
        wait_for_predecessors();
        waited = true;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int k = from + i * kStep * kWarps + kVector * t;
        left[i] = load16(low + k, k < p.in && low_there);
        right[i] = load16(high + k, k < p.in && high_there);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) multiply_step(sums, left[i], right[i], weights[i]);
    }
    __syncthreads();  // the sums of the run before have been read
    parts[warp][g][2 * t] = sums[0];
    parts[warp][g][2 * t + 1] = sums[1];
    parts[warp][g + 8][2 * t] = sums[2];
    parts[warp][g + 8][2 * t + 1] = sums[3];
    __syncthreads();
    const int i = threadIdx.x / kLowRankDown, j = threadIdx.x % kLowRankDown;
    if (i < begin || i >= end) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w][i][j];
    static_cast<H*>(p.low)[static_cast<int64>(rows.row[i]) * p.low_stride + first + j] = to_half(sum);
  }
  wait_for_predecessors();  // in every block: the kernels behind count on it
}

extern "C" __global__ void __launch_bounds__(kLowRankThreads)
    low_rank_up(const __grid_constant__ LowRankParams p) {
  constexpr int kHeldRuns = 4, kHeldSteps = 2;  // of B in registers
  __shared__ Rows rows;
  start_successors();
  read_rows(p, rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * kLowRankUp;
  // Columns of y of this warp: of two interleaved matrices those of one, every other column.
  const auto column = [&](int parts, int i) {
    return parts == 1 ? first + 8 * warp + i : first + warp / 2 * 16 + 2 * i + warp % 2;
  };
  const auto load_b = [&](const LowRankEntry& entry, int step) {
    const int width = entry.rank / entry.parts, k = kStep * step + kVector * t, row = column(entry.parts, g);
    const int64 at = static_cast<int64>(row) * entry.rank + row % entry.parts * width + k;
    return load16(static_cast<const H*>(entry.b) + at, row < p.out && k < width);
  };
  // A x of row i of the block.
  const auto load_low = [&](int i, int step) {
    const LowRankEntry& entry = rows.entry[i];
    const int width = entry.rank / entry.parts, k = kStep * step + kVector * t;
    const int64 at =
        static_cast<int64>(rows.row[i]) * p.low_stride + column(entry.parts, 0) % entry.parts * width + k;
    return load16(static_cast<const H*>(p.low) + at, k < width);
  };
  uint4 b[kHeldRuns][kHeldSteps], low[kHeldSteps], high[kHeldSteps];
#pragma unroll
  for (int run = 0; run < kHeldRuns; ++run) {
#pragma unroll
    for (int step = 0; step < kHeldSteps; ++step) {
      b[run][step] = run < rows.n_runs ? load_b(rows.entry[rows.begin[run]], step) : make_uint4(0, 0, 0, 0);
    }
  }
  wait_for_predecessors();
#pragma unroll
  for (int step = 0; step < kHeldSteps; ++step) {
    low[step] = load_low(g, step);
    high[step] = load_low(g + 8, step);
  }

  // Products of a run for all rows, kept for its own.
  const auto finish = [&](int run, const uint4* of_run) {
    const int begin = rows.begin[run], end = rows.begin[run + 1];
    const LowRankEntry& entry = rows.entry[begin];
    const bool low_there = g >= begin && g < end, high_there = g + 8 >= begin && g + 8 < end;
    const uint4 none = make_uint4(0, 0, 0, 0);
    float sums[4] = {};
#pragma unroll
    for (int step = 0; step < kHeldSteps; ++step) {
      multiply_step(sums, low_there ? low[step] : none, high_there ? high[step] : none,
                    of_run != nullptr ? of_run[step] : load_b(entry, step));
    }
    for (int step = kHeldSteps; kStep * step < entry.rank / entry.parts; ++step) {
      multiply_step(sums, low_there ? load_low(g, step) : none, high_there ? load_low(g + 8, step) : none,
                    load_b(entry, step));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int out = column(entry.parts, 2 * t + i);
      if (out >= p.out) continue;
      if (low_there && rows.row[g] >= 0) p.y[static_cast<int64>(rows.row[g]) * p.out + out] = sums[i];
      if (high_there && rows.row[g + 8] >= 0)
        p.y[static_cast<int64>(rows.row[g + 8]) * p.out + out] = sums[2 + i];
    }
  };
#pragma unroll
  for (int run = 0; run < kHeldRuns; ++run) {
    if (run < rows.n_runs) finish(run, b[run]);
  }
  for (int run = kHeldRuns; run < rows.n_runs; ++run) finish(run, nullptr);
}

}  // namespace qvl::cuda
