// A x of low-rank adapters for decode rows, for low_rank.cu and for the products on Hopper, which compute it
// while their first weights are in flight.
//
// Layout. low H [n][rank] is divided into units: 8 rows of A, 16 rows of x, every kLowRankRuns-th run of rows
// with the same adapter. 16 warps share k in steps of 32; their sums are added in order in shared memory.
//
// Cost. A is read once per adapter, x once per 8 rows of A, from the L2 cache. A unit is bound by the latency
// of two loads: 4096 values of k are 8 steps per warp, with the loads of 4 steps in flight. More would need
// more registers than the products of the base weights leave.
//
// Reference: float64 in PyTorch, tests/cuda/test_low_rank.py.
#pragma once

#include "cuda/kernels/low_rank.h"
#include "cuda/kernels/streams.cuh"

namespace qvl::cuda {
namespace {

constexpr int kVector = 8;  // values of H per load of a lane
constexpr int kStep = 32;   // values of k per step of a warp

// The block's rows of x, in runs with the same adapter or without one.
struct Rows {
  int row[kLowRankRows];  // -1: none
  LowRankEntry entry[kLowRankRows];
  int begin[kLowRankRows + 1];  // of each run
  int n_runs;
};

template <class Sync>
__device__ inline void read_rows(const LowRankParams& p, Rows& rows, int block, const Sync& sync) {
  if (threadIdx.x < 32) {
    const int i = threadIdx.x % kLowRankRows, at = block * kLowRankRows + i;
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
  sync();
}

__device__ inline uint4 load16(const void* from, bool there) {
  return there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
}

// `value`, or zeros. `there ? a : b` of structs would select an address, of local memory.
__device__ inline uint4 keep_if(bool there, const uint4& value) {
  return make_uint4(there ? value.x : 0, there ? value.y : 0, there ? value.z : 0, there ? value.w : 0);
}

// sums [16, 8] += rows g and g + 8 of the left operand times row g of the right one, 8 values of k per lane.
__device__ inline void multiply_step(float (&sums)[4], const uint4& low, const uint4& high,
                                     const uint4& right) {
  multiply(sums, low.x, high.x, low.y, high.y, right.x, right.y);
  multiply(sums, low.z, high.z, low.w, high.w, right.z, right.w);
}

constexpr int kLowRankWarps = kLowRankDownThreads / 32;

struct LowRankScratch {
  Rows rows;
  float parts[kLowRankWarps][kLowRankRows][kLowRankDown];
};

// Number of units of a product's A x.
__device__ inline int low_rank_units(const LowRankParams& p) {
  return p.low_stride / kLowRankDown * ((p.n + kLowRankRows - 1) / kLowRankRows) * kLowRankRuns;
}

// Compute a unit with kLowRankDownThreads threads: rows kLowRankDown * part .. of A, rows kLowRankRows *
// block .. of x, runs first_run, first_run + kLowRankRuns ... `sync`: barrier of these threads. `before_x`:
// called before x is read, at most once.
template <class Sync, class BeforeX>
__device__ inline void lower(const LowRankParams& p, LowRankScratch& scratch, int part, int block,
                             int first_run, const Sync& sync, const BeforeX& before_x) {
  constexpr int kAtOnce = 4;
  const Rows& rows = scratch.rows;
  read_rows(p, scratch.rows, block, sync);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = part * kLowRankDown;  // row of A
  const H* const x = static_cast<const H*>(p.x);
  bool called = false;
  for (int run = first_run; run < rows.n_runs; run += kLowRankRuns) {
    const int begin = rows.begin[run], end = rows.begin[run + 1];
    const LowRankEntry& entry = rows.entry[begin];
    if (first >= entry.rank) continue;
    const H* const a = static_cast<const H*>(entry.a) + static_cast<int64>(first + g) * p.in;
    const bool low_there = g >= begin && g < end, high_there = g + 8 >= begin && g + 8 < end;
    const H* const low = x + (low_there ? rows.row[g] * p.x_stride : 0);
    const H* const high = x + (high_there ? rows.row[g + 8] * p.x_stride : 0);
    float sums[4] = {};
    for (int from = kStep * warp; from < p.in; from += kStep * kLowRankWarps * kAtOnce) {
      uint4 left[kAtOnce], right[kAtOnce], weights[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int k = from + i * kStep * kLowRankWarps + kVector * t;
        weights[i] = load16(a + k, k < p.in);
      }
      if (!called) {
        before_x();
        called = true;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int k = from + i * kStep * kLowRankWarps + kVector * t;
        left[i] = load16(low + k, k < p.in && low_there);
        right[i] = load16(high + k, k < p.in && high_there);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) multiply_step(sums, left[i], right[i], weights[i]);
    }
    auto& parts = scratch.parts;
    parts[warp][g][2 * t] = sums[0];
    parts[warp][g][2 * t + 1] = sums[1];
    parts[warp][g + 8][2 * t] = sums[2];
    parts[warp][g + 8][2 * t + 1] = sums[3];
    sync();
    const int i = threadIdx.x / kLowRankDown, j = threadIdx.x % kLowRankDown;
    if (i >= begin && i < end) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kLowRankWarps; ++w) sum += parts[w][i][j];
      static_cast<H*>(p.low)[static_cast<int64>(rows.row[i]) * p.low_stride + first + j] = to_half(sum);
    }
    sync();  // the sums have been read
  }
}

}  // namespace
}  // namespace qvl::cuda
