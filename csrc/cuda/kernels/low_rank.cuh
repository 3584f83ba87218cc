// A x of low-rank adapters for decode rows, for low_rank.cu and for the products on Hopper, which compute it
// while their first weights are in flight.
//
// Layout. A run is a sequence of rows of x with the same adapter. The work for low H [n][rank] is divided
// into units: 8 rows of A times those of 16 rows of x that belong to every kLowRankRuns-th run. The 16 warps
// of a block share k in steps of 32; their sums are added in order in shared memory.
//
// Cost. A is read once per adapter, x once per 8 rows of A, from the L2 cache. A unit is bound by the latency
// of two loads: 4096 values of k are 8 steps per warp, with the loads of 4 steps in flight. More loads in
// flight would need more registers than the Hopper kernels, which include this code, have left.
//
// Reference: float64 in PyTorch, tests/cuda/test_low_rank.py.
#pragma once

#include "cuda/kernels/low_rank.h"
#include "cuda/kernels/streams.cuh"

namespace qvl::cuda {
namespace {

constexpr int kVector = 8;  // values of H per load of a lane
constexpr int kStep = 32;   // values of k per step of a warp

// A block's rows of x, in runs with the same adapter or without one.
struct Rows {
  int row[kLowRankRows];             // index of the row in x; -1: no row
  LowRankEntry entry[kLowRankRows];  // of the row's adapter; rank 0: no adapter
  int begin[kLowRankRows + 1];       // first row of each run, then kLowRankRows
  int n_runs;
};

// Fill `rows` with kLowRankRows rows from index kLowRankRows * block of the order on. Called by all threads
// of the block.
__device__ inline void read_rows(const LowRankParams& p, Rows& rows, int block) {
  if (threadIdx.x < 32) {
    const int i = threadIdx.x % kLowRankRows, index = block * kLowRankRows + i;
    const int row = index >= p.n ? -1 : p.order != nullptr ? p.order[index] : index;
    const auto* const adapter = reinterpret_cast<const LowRankEntry*>(row < 0 ? 0 : p.adapters[row]);
    const LowRankEntry entry = adapter != nullptr ? adapter[p.product] : LowRankEntry{nullptr, nullptr, 0, 1};
    const uint64 b_address = reinterpret_cast<uint64>(entry.b);
    const uint64 previous_address = __shfl_up_sync(0xFFFFFFFFu, b_address, 1);
    const bool starts = threadIdx.x < kLowRankRows && (i == 0 || b_address != previous_address);
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

__device__ inline uint4 load16(const void* from, bool valid) {
  return valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
}

__device__ inline uint4 load16_from_l2(const void* from, bool valid) {
  return valid ? __ldcg(static_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
}

// `value`, or zeros. `valid ? a : b` of structs would select an address and force them into local memory.
__device__ inline uint4 keep_if(bool valid, const uint4& value) {
  return make_uint4(valid ? value.x : 0, valid ? value.y : 0, valid ? value.z : 0, valid ? value.w : 0);
}

// sums [16, 8] += left [16, 32] right [8, 32]^T. `low`, `high`: 8 values of rows g and g + 8 of the left
// operand; `right`: 8 values of row g of the right one.
__device__ inline void multiply_step(float (&sums)[4], const uint4& low, const uint4& high,
                                     const uint4& right) {
  multiply(sums, low.x, high.x, low.y, high.y, right.x, right.y);
  multiply(sums, low.z, high.z, low.w, high.w, right.z, right.w);
}

}  // namespace
}  // namespace qvl::cuda
