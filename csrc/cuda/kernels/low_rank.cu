// Low-rank adapters (LoRA), y = f(W x + B (A x)), for decode rows, each with its own adapter or none. f is
// the epilogue; the product of the base weight omits it and writes raw = W x, both for decode rows and for
// prompts. If f only stores or adds float32, that product stores W x in y or adds it to y, and raw is y.
//
// Layout. A block has 16 rows of x, sorted by adapter into runs with the same adapter. In mma.m16n8k16 they
// are the m of low_rank_up, which computes a run's products for all 16 rows, with zeros for the rows of other
// runs. For low_rank_down, whose m are rows of A, they are the n: 8 or 16 rows from the first of the run on.
// Products are stored only for the rows of the run:
//
//   low_rank_down   blocks (16 rows of A, 16 rows of x, slices of k x groups of runs)    x -> low H [n][rank]
//                   the warps share a slice in steps of 32; their sums, and then those of the slices, are
//                   added in order
//   low_rank_up     blocks (32 rows of B, 16 rows of x)         low, raw float32 [n][out] -> y
//                   8 or 16 rows of B and one run at a time per warp; B (A x) of the block in shared memory;
//                   then per thread two columns of two rows
//   finish_raw      for prompts: products as for any weight have added B (A x) to raw [n][out]; raw -> y
//
//   time ->   | product of the base weight: raw = W x      | low_rank_up |
//                 | low_rank_down: low = A x, on Hopper    |
//
// On Hopper the product starts low_rank_down as soon as x is complete. A multiprocessor then has registers
// for one block of low_rank_down, whose 3 warps are as many as fit beside a block of the product: of the
// 16384 registers of each quarter of a multiprocessor, the 17 warps of the product, with up to 96 registers
// per lane, leave 128 per lane for one warp in three quarters and none in the fourth. Further blocks start
// when the product ends; a large low_rank_down therefore has half as many, with two slices each.
//
// Cost. Bytes: A and B once per adapter: (in + out) * rank values, 2 MB for rank 64 of a 4096 x 12288
// product, compared with 24 to 96 MiB of base weights (4 to 16 bits); x once per 16 rows of A, from the L2
// cache. The kernels are latency-bound. They therefore read A, B and the tables before the preceding kernels
// end, none of which writes these, and have many loads in flight.
//
// The sums of a row depend only on the row and its adapter, since the steps and their order are the same in
// every batch. The result of a row without an adapter has the same bits as in a batch without adapters.
//
// Reference: float64 in PyTorch, tests/cuda/test_low_rank.py; without a GPU, the kernels compiled for the
// host against float64, tests/engine/test_hopper_products.py.
#include "cuda/kernels/low_rank.h"

#include "cuda/kernels/linear_prompt.cuh"
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
  int run[kLowRankRows];             // of the row
  int n_runs;
};

// Fill `rows` with kLowRankRows rows from index kLowRankRows * block of the order on. Called by all threads
// of the block.
__device__ inline void read_rows(const LowRankParams& p, Rows& rows, int block) {
  if (threadIdx.x < 32) {
    const int i = threadIdx.x % kLowRankRows, index = block * kLowRankRows + i;
    const int row = index >= p.n ? -1 : p.order != nullptr ? p.order[index] : index;
    const auto* const adapter = reinterpret_cast<const LowRankEntry*>(row < 0 ? 0 : p.adapters[index]);
    const LowRankEntry entry = adapter != nullptr ? adapter[p.product] : LowRankEntry{nullptr, nullptr, 0, 1};
    const uint64 b_address = reinterpret_cast<uint64>(entry.b);
    const uint64 previous_address = __shfl_up_sync(0xFFFFFFFFu, b_address, 1);
    const bool starts = threadIdx.x < kLowRankRows && (i == 0 || b_address != previous_address);
    const uint32 mask = __ballot_sync(0xFFFFFFFFu, starts);
    if (threadIdx.x < kLowRankRows) {
      rows.row[i] = row;
      rows.entry[i] = entry;
      rows.run[i] = __popc(mask & ((2u << i) - 1)) - 1;
      if (starts) rows.begin[rows.run[i]] = i;
      if (i == 0) {
        rows.n_runs = __popc(mask);
        rows.begin[rows.n_runs] = kLowRankRows;
      }
    }
  }
  __syncthreads();
}

// 16 bytes, or zeros.
__device__ inline uint4 load16(const void* from, bool valid) {
  return valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
}

// As load16, but past the L1 cache, which may have older values: if x_is_complete, low_rank_down does not
// wait for the kernel that wrote x.
__device__ inline uint4 load16_from_l2(const void* from, bool valid) {
  return valid ? __ldcg(static_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
}

// sums [16, 8] += left [16, 32] right [8, 32]^T. `low`, `high`: 8 values of rows g and g + 8 of the left
// operand; `right`: 8 values of row g of the right one.
__device__ inline void multiply_step(float (&sums)[4], const uint4& low, const uint4& high,
                                     const uint4& right) {
  multiply(sums, low.x, high.x, low.y, high.y, right.x, right.y);
  multiply(sums, low.z, high.z, low.w, high.w, right.z, right.w);
}

// Columns `column` and column + 1 of a row of raw float32 [n, out]; 0 beyond `out` and for row -1.
__device__ inline float2 load_raw(const float* raw, const Result& result, int row, int column) {
  const float* const from = raw + static_cast<int64>(row) * result.out + column;
  const bool valid = row >= 0 && column < result.out;
  return make_float2(valid ? __ldcg(from) : 0, valid && column + 1 < result.out ? __ldcg(from + 1) : 0);
}

// A tile of low_rank_up is the even or the odd ones of 16 rows of B: if the weight is two interleaved
// matrices, all 8 belong to one of them. A block has kTiles tiles of even and kTiles of odd rows.
constexpr int kTiles = kLowRankUp / 16;

// What a warp of low_rank_up computes at a time: B (A x) of one run, for all even or all odd rows of B of the
// block. With one run, an item is a single tile, so that all warps have one.
struct Item {
  const H* b;      // row 0 of B, from the first rank of the item's matrix on
  int stride;      // of B
  int begin, end;  // rows of the run in the block
  int rank;        // number of ranks of the item's matrix; 0 beyond the last item
  int first_rank;  // of the item's matrix, in A x
  int column;      // first row of B of the first tile, in the block
};

// Blocks of low_rank_up per multiprocessor, which limits the registers. Before sm_80, where shuffles replace
// the matrix instructions (streams.cuh), a lane needs more of them.
#if __CUDA_ARCH__ >= 800
constexpr int kUpBlocks = 6;
#else
constexpr int kUpBlocks = 4;
#endif

// Number of tiles of an item.
__device__ inline int tiles_of(const Rows& rows) {
  return rows.n_runs == 1 ? 1 : kTiles;
}

// Number of items of the block.
__device__ inline int items_of(const Rows& rows) {
  return rows.n_runs == 1 ? 2 * kTiles : 2 * rows.n_runs;
}

__device__ inline Item item_of(const Rows& rows, int index) {
  const int run = rows.n_runs == 1 ? index / (2 * kTiles) : index / 2, matrix = index % 2;
  Item item{};
  if (run >= rows.n_runs) return item;
  item.begin = rows.begin[run];
  item.end = rows.begin[run + 1];
  const LowRankEntry& entry = rows.entry[item.begin];
  item.stride = entry.rank;
  item.rank = entry.parts == 1 ? entry.rank : entry.rank / 2;
  item.first_rank = entry.parts == 1 ? 0 : matrix * item.rank;
  item.b = static_cast<const H*>(entry.b) + item.first_rank;
  item.column = rows.n_runs == 1 ? 16 * (index / 2) + matrix : matrix;
  return item;
}

}  // namespace

// The launch bounds set the limit of registers to 128.
extern "C" __global__ void __launch_bounds__(128, 4) low_rank_down(const __grid_constant__ LowRankParams p) {
  // A warp loads kLoads steps of A and of x at a time: for in = 4096, the three warps together the whole
  // slice of 16 steps.
  constexpr int kWarps = kLowRankDownThreads / 32, kLoads = 6;
  __shared__ Rows rows;
  __shared__ float warp_sums[kLowRankMaxSlices][kWarps][kLowRankRows][kLowRankDown];
  __shared__ bool is_last;
  start_successors();
  read_rows(p, rows, blockIdx.y);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * kLowRankDown;  // row of A
  // The blocks of a group have the same runs, and one or two slices each.
  const int group_blocks = kLowRankSlices / p.block_slices, groups = gridDim.z / group_blocks;
  const int group = blockIdx.z / group_blocks, first_slice = blockIdx.z % group_blocks * p.block_slices;

  const int steps = (p.in + kStep - 1) / kStep;
  const H* const x = static_cast<const H*>(p.x) + kVector * t;
  bool x_is_complete = p.x_is_complete;
#pragma unroll 1
  for (int run = group; run < rows.n_runs; run += groups) {
    const int begin = rows.begin[run], end = rows.begin[run + 1];
    const LowRankEntry& entry = rows.entry[begin];
    if (first >= entry.rank) continue;
    const H* const a = static_cast<const H*>(entry.a) + static_cast<int64>(first + g) * p.in + kVector * t;
    const bool has_high = first + 8 < entry.rank;
#pragma unroll 1
    for (int i_slice = 0; i_slice < p.block_slices; ++i_slice) {
      const int slice = first_slice + i_slice;
      const int begin_step = steps * slice / kLowRankSlices, end_step = steps * (slice + 1) / kLowRankSlices;
      float sums[2][4] = {};  // of rows `begin` to begin + 7 of x, and of the 8 rows after them
      for (int from = begin_step + kLoads * warp; from < end_step; from += kLoads * kWarps) {
        const auto is_valid = [&](int step) { return step < end_step && kStep * step + kVector * t < p.in; };
        uint4 low[kLoads], high[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          low[i] = load16(a + kStep * (from + i), is_valid(from + i));
          high[i] = load16(a + 8 * p.in + kStep * (from + i), is_valid(from + i) && has_high);
        }
        if (!x_is_complete) {
          wait_for_predecessors();
          x_is_complete = true;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = begin + 8 * half + g;
          if (begin + 8 * half >= end) break;
          const H* const x_row = x + (row < end ? rows.row[row] * p.x_stride : 0);
          uint4 values[kLoads];
#pragma unroll
          for (int i = 0; i < kLoads; ++i)
            values[i] = load16_from_l2(x_row + kStep * (from + i), is_valid(from + i) && row < end);
#pragma unroll
          for (int i = 0; i < kLoads; ++i) multiply_step(sums[half], low[i], high[i], values[i]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = begin + 8 * half + 2 * t + i;
          if (row >= end) continue;
          warp_sums[i_slice][warp][row][g] = sums[half][i];
          warp_sums[i_slice][warp][row][g + 8] = sums[half][2 + i];
        }
      }
    }
  }
  // The preceding low_rank_down uses the same scratch memory: wait, even without a step to compute. With
  // x_is_complete that kernel has ended: the product waited for it before it started this one.
  if (!p.x_is_complete) wait_for_predecessors();
  __syncthreads();

  // Each thread has elements of A x, if their runs are of this block: row i of the block, row first + j of A.
  constexpr int kElements = (kLowRankRows * kLowRankDown + kLowRankDownThreads - 1) / kLowRankDownThreads;
  const int64 slice_size = static_cast<int64>(p.n) * p.low_stride;
  const int j = threadIdx.x % kLowRankDown;
  int64 index[kElements];  // -1: none
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int i = threadIdx.x / kLowRankDown + e * (kLowRankDownThreads / kLowRankDown);
    const bool has_element =
        i < kLowRankRows && rows.run[i] % groups == group && first + j < rows.entry[i].rank;
    index[e] = has_element ? static_cast<int64>(rows.row[i]) * p.low_stride + first + j : -1;
    if (!has_element) continue;
    for (int i_slice = 0; i_slice < p.block_slices; ++i_slice) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += warp_sums[i_slice][w][i][j];
      p.slices[(first_slice + i_slice) * slice_size + index[e]] = sum;
    }
  }
  __threadfence();
  __syncthreads();
  // The block that is last to finish its slices adds all slices, always in the same order.
  if (threadIdx.x == 0) {
    int* const counter = p.counters + (blockIdx.y * gridDim.x + blockIdx.x) * groups + group;
    is_last = atomicAdd(counter, p.block_slices) == kLowRankSlices - p.block_slices;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (is_last) {
    __threadfence();
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (index[e] < 0) continue;
      float sum = 0;
#pragma unroll
      for (int s = 0; s < kLowRankSlices; ++s) sum += __ldcg(p.slices + s * slice_size + index[e]);
      static_cast<H*>(p.low)[index[e]] = to_half(sum);
    }
  }
  // low_rank_up waits for this kernel only, but reads W x, the result of the kernel before this one: so this
  // kernel must not end before that one. One block that waits suffices; the others make room.
  if (blockIdx.x + blockIdx.y + blockIdx.z == 0) wait_for_predecessors();
}

extern "C" __global__ void __launch_bounds__(kLowRankThreads, kUpBlocks)
    low_rank_up(const __grid_constant__ LowRankParams p) {
  constexpr int kWarps = kLowRankThreads / 32;
  constexpr int kLoads = 2;  // steps of 32 columns of B that are requested together
  __shared__ Rows rows;
  __shared__ float updates[kLowRankRows][kLowRankUp + 2];
  read_rows(p, rows, blockIdx.y);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * kLowRankUp;
  const int tiles = tiles_of(rows), items = items_of(rows);

  uint4 b[kTiles][kLoads];
  // 8 values of row g of each tile's rows of B per step.
  const auto load_b = [&](const Item& item, int step) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int row = first + item.column + 16 * i + 2 * g, k = kStep * step + kVector * t;
      const H* const from = item.b + static_cast<int64>(row) * item.stride + k;
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        b[i][j] = load16(from + kStep * j, i < tiles && row < p.result.out && k + kStep * j < item.rank);
    }
  };
  Item item = item_of(rows, warp);
  load_b(item, 0);
  wait_for_predecessors();
  start_successors();
  // raw of this thread's columns of y, requested before the products and used after them.
  constexpr int kPairs = kLowRankRows * kLowRankUp / 2 / kLowRankThreads;
  float2 raw[kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int i = threadIdx.x + pair * kLowRankThreads, row = rows.row[i / (kLowRankUp / 2)];
    const int column = first + i % (kLowRankUp / 2) * 2;
    raw[pair] = load_raw(p.raw, p.result, row, column);
  }

  // The loops are not unrolled: in a kernel of a few microseconds the time to fetch the code matters.
#pragma unroll 1
  for (int index = warp; index < items;) {
    // Rows of x of A x that this lane loads, if they are of the run; else -1.
    const int low_row = g >= item.begin && g < item.end ? rows.row[g] : -1;
    const int high_row = g + 8 >= item.begin && g + 8 < item.end ? rows.row[g + 8] : -1;
    float sums[kTiles][4] = {};
#pragma unroll 1
    for (int step = 0;;) {
      const int k = kStep * step + kVector * t;
      const H* const from = static_cast<const H*>(p.low) + item.first_rank + k;
      uint4 low[kLoads], high[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const bool valid = k + kStep * j < item.rank;
        low[j] = load16(from + static_cast<int64>(low_row) * p.low_stride + kStep * j, valid && low_row >= 0);
        high[j] =
            load16(from + static_cast<int64>(high_row) * p.low_stride + kStep * j, valid && high_row >= 0);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) multiply_step(sums[i], low[j], high[j], b[i][j]);
      }
      step += kLoads;
      if (kStep * step >= item.rank) break;
      load_b(item, step);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = item.column + 16 * i + 2 * (2 * t + j);
        if (i < tiles && low_row >= 0) updates[g][column] = sums[i][j];
        if (i < tiles && high_row >= 0) updates[g + 8][column] = sums[i][2 + j];
      }
    }
    index += kWarps;
    if (index >= items) break;
    item = item_of(rows, index);
    load_b(item, 0);
  }
  __syncthreads();

#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int i = threadIdx.x + pair * kLowRankThreads, block_row = i / (kLowRankUp / 2);
    const int local_column = i % (kLowRankUp / 2) * 2, row = rows.row[block_row];
    if (row < 0 || first + local_column >= p.result.out) continue;
    finish_pair(p.result, row, first + local_column, updates[block_row][local_column] + raw[pair].x,
                updates[block_row][local_column + 1] + raw[pair].y);
  }
}

extern "C" __global__ void __launch_bounds__(kFinishThreads)
    finish_raw(const __grid_constant__ FinishParams p) {
  start_successors();
  wait_for_predecessors();
  const int column = 2 * (blockIdx.x * kFinishThreads + threadIdx.x), row = blockIdx.y;
  if (column >= p.result.out) return;
  const float2 raw = load_raw(p.raw, p.result, row, column);
  finish_pair(p.result, row, column, raw.x, raw.y);
}

}  // namespace qvl::cuda
