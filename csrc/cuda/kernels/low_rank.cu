// Low-rank adapters (LoRA), y = f(W x + B (A x)): decode rows, each with its own adapter or none, and the end
// of both kinds of rows. f is the epilogue of the product, which the product of the base weight leaves out
// here.
//
// Layout. A block has 16 rows of x, sorted by adapter: runs of rows that share one, the 16 rows of
// mma.m16n8k16. A run's products are computed for all 16, zeros in the place of the others, and kept for its
// own:
//
//   low_rank_down   blocks (8 rows of A, 16 rows of x, runs)    x -> low H [n][rank]
//                   16 warps share k in steps of 32; their sums meet in shared memory, in order
//   low_rank_up     blocks (64 rows of B, 16 rows of x)         low, raw float32 [n][out] -> y
//                   8 rows of B per warp, a tile of sums in shared memory, then two columns per thread
//   finish_raw      prompts, whose B A x an ordinary product has added to raw    raw float32 [n][out] -> y
//
// Cost. Bytes: A and B once for each adapter: (in + out) rank values, at rank 64 of a 4096 x 12288 product 2
// MB, beside 24 to 96 MB of base weights. Latency bounds the kernels: A, B and the tables are read before the
// predecessors end, which write x, low and raw alone.
//
// A row's sums depend on the row and its adapter alone: the steps and their order are the same in any batch,
// and a row without an adapter gets the bits that it gets without adapters in the batch.
//
// Reference: float64 in PyTorch, tests/cuda/test_low_rank.py.
#include "cuda/kernels/low_rank.h"

#include "cuda/kernels/linear_prompt.cuh"
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

// a, b += raw float32 [n, out] of columns `column` and column + 1, as far as they exist.
__device__ inline void add_raw(const float* raw, const Result& result, int row, int column, float& a,
                               float& b) {
  const float* const from = raw + static_cast<int64>(row) * result.out + column;
  a += __ldcg(from);
  if (column + 1 < result.out) b += __ldcg(from + 1);
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
  wait_for_predecessors();  // in every block: the next kernels count on it
}

extern "C" __global__ void __launch_bounds__(kLowRankThreads)
    low_rank_up(const __grid_constant__ LowRankParams p) {
  constexpr int kHeldRuns = 4, kHeldSteps = 2;  // of B in registers
  __shared__ Rows rows;
  __shared__ float tile[kLowRankRows][kLowRankUp + 2];
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
    return load16(static_cast<const H*>(entry.b) + at, row < p.result.out && k < width);
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
      const int local = column(entry.parts, 2 * t + i) - first;
      if (low_there) tile[g][local] = sums[i];
      if (high_there) tile[g + 8][local] = sums[2 + i];
    }
  };
#pragma unroll
  for (int run = 0; run < kHeldRuns; ++run) {
    if (run < rows.n_runs) finish(run, b[run]);
  }
  for (int run = kHeldRuns; run < rows.n_runs; ++run) finish(run, nullptr);
  __syncthreads();

  const Result& result = p.result;
  for (int i = threadIdx.x; i < kLowRankRows * kLowRankUp / 2; i += kLowRankThreads) {
    const int at = i / (kLowRankUp / 2), local = i % (kLowRankUp / 2) * 2, row = rows.row[at];
    if (row < 0 || first + local >= result.out) continue;
    float a = tile[at][local], b = tile[at][local + 1];
    if (p.raw != nullptr) add_raw(p.raw, result, row, first + local, a, b);
    finish_pair(result, row, first + local, a, b);
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
