// y = x W^T for 1 to 256 rows of x on Hopper: wgmma with W as its left operand, loaded by TMA.
//
// Layout. A tile is `rows` rows of W, up to 64 * kSubtiles, by N rows of x, its columns. k advances in steps
// of 64 (H) or 128 values (quantized) and is divided into four slices, one per warpgroup, each summed in
// ascending order:
//
//               k ->  slice 0    slice 1    slice 2    slice 3
//   W tile    rows  | group 0  | group 1  | group 2  | group 3  |     (0 + 1) + (2 + 3) in shared memory
//   x         N     |          |          |          |          |
//
//   shared:  stages [x boxes | weights | scales] .. | sums [parts][4][columns][64 + 4] | barriers full, empty
//
//   warps 0-15:  4 warpgroups: wait for full, multiply, arrive at empty
//   warp 16:     wait for empty, request W and x of the next item
//
// An item is 1 to 4 steps of a slice, copied together into a stage. Items alternate between the slices and
// are prefetched into all stages. All warps request the items that fill the stages for the first time, warp
// 16 the later ones. The bits of a row of y depend on none of `rows`, N and the number of steps of an item.
// Blocks are persistent, one per multiprocessor. Where registers and shared memory allow, the kernels between
// this product and the next become resident while this one runs. The next product becomes resident on a
// multiprocessor when no block of this one is left there, and prefetches its first stages. With 8 stages, two
// per warpgroup, a warpgroup multiplies one while the other is in flight.
//
// The kernel is a template of the storage type: linear_decode_hopper.cu has the types without zero points,
// linear_decode_hopper_groups.cu those with zero points.
//
// Cost. Bytes: each weight once, 4.3 TB/s on an H200, 33 KB per microsecond and multiprocessor; x once per
// tile, from the L2 cache. time = bytes of W / bandwidth. A wgmma multiplies 2 KB of W in H by up to 64 rows
// of x, so few instructions are needed; weights of 8 and 4 bits are converted to H in registers, with about
// 1.5 instructions per lane and value.
//
// Reference: float64 in PyTorch, tests/cuda/test_decode.py; without a GPU, the kernel compiled for the host
// against float64, tests/engine/test_hopper_products.py.
#pragma once

#include "cuda/kernels/hopper.cuh"
#include "cuda/kernels/linear_decode.h"
#include "cuda/kernels/linear_prompt.cuh"
#include "cuda/kernels/quantized.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace qvl::cuda {
namespace {

constexpr int kGroups = kHopperGroups;  // warpgroups that multiply, not groups of weights
constexpr int kThreads = 128 * kGroups + 32;
constexpr int kBoxBytes = 128;   // a row of 64 values of H
constexpr int kLineBytes = 512;  // of quantized weights, in a tensor map

__device__ inline int slice_begin(int steps, int slice) {
  return steps * slice / kGroups;
}

// Work of a warp in a step. Addresses (x, weights, scales) are in shared memory.
struct Step {
  uint32 x, weights, scales;
  int tile;  // the warp's first tile of 16 rows of W; its next tiles are 4 apart
  int lane;
  int rows;  // of W in the block's tile
};

// Descriptor of x in a stage from value k on, a multiple of 16.
template <int N>
__device__ inline uint64 describe_x(uint32 x, int k) {
  return wgmma_descriptor(x + k / 64 * (N * kBoxBytes)) + k % 64 / 8;
}

// Add the products of a group of weights to the sums, multiplied by the group's scales of rows g = lane / 4
// (`first`) and g + 8 (`second`) of a warp's tile.
template <int kSums>
__device__ inline void fold_group(float (&sums)[kSums], float (&part)[kSums], float first, float second) {
  fence_registers(part);
#pragma unroll
  for (int j = 0; j < kSums; ++j) sums[j] += (j % 4 < 2 ? first : second) * part[j];
}

// Position of an item in the ring of stages; `phase`: parity of the number of completed rounds of the ring.
struct RingPosition {
  int item = 0, stage = 0;
  uint32 phase = 0;

  // Advance to a later item, counted over all tiles.
  __device__ void advance(int to, int stages) {
    for (stage += to - item; stage >= stages; stage -= stages) phase ^= 1;
    item = to;
  }
};

// Weights: the storage type. kBoxes: number of boxes of x in a step; kInRegisters: whether wgmma reads W from
// registers (quantized types) or from shared memory (H); kHasGroups: whether groups of a row have scales;
// step_bytes(), scale_bytes(): size of the W tile in a step, and of its scales; add(): add the products of a
// step to the sums, possibly still in flight at the return; scale(): factor of the sums of a row.
template <class Weights, int N, int kSubtiles>
__device__ inline void linear_decode(const LinearHopper& p) {
  constexpr int kXBytes = Weights::kBoxes * N * kBoxBytes;  // per step
  constexpr bool kQuantized = Weights::kInRegisters;
  constexpr int kColumns = hopper_columns(N, kQuantized, Weights::kHasGroups);
  constexpr int kParts = hopper_parts(N, kSubtiles, kQuantized);
  constexpr int kPartFloats = kGroups * kColumns * kHopperColumn;
  extern __shared__ char raw[];
  char* const aligned = raw + (-static_cast<uint32>(__cvta_generic_to_shared(raw)) & 1023);
  const uint32 ring = static_cast<uint32>(__cvta_generic_to_shared(aligned));
  float* const sums_out = reinterpret_cast<float*>(aligned + p.stages * p.stage_bytes);
  const uint32 full = ring + p.stages * p.stage_bytes +
                      hopper_sum_bytes(N, kSubtiles, kQuantized, Weights::kHasGroups),
               empty = full + 8 * p.stages;
  // The shuffle makes the compiler keep values derived from the warp number in uniform registers.
  const int warp = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
  const int first_row = blockIdx.y * N;  // of x
  const int step_bytes = Weights::step_bytes(p.rows), scale_bytes = Weights::scale_bytes(p.rows);
  // Offsets in a stage: x of all steps, then weights, then scales.
  const int weights_at = p.steps * kXBytes, scales_at = weights_at + p.steps * step_bytes;

  // Copy boxes of 64 values by several rows: all in one copy if `in` is a multiple of 64 (whole_boxes), else
  // in one copy per box.
  const auto copy_boxes = [&](const TensorMap& map, uint32 to, int row, int first, int count, int box_bytes,
                              uint32 barrier) {
    if (p.whole_boxes) return copy_box(to, map, 0, row, first, barrier);
    for (int i = 0; i < count; ++i) copy_box(to + i * box_bytes, map, 64 * (first + i), row, barrier);
  };
  const auto step_of = [&](int item) {
    return slice_begin(p.total_steps, item % kGroups) + item / kGroups * p.steps;
  };
  const auto request_weights = [&](int stage, int tile, int item) {
    const uint32 to = ring + stage * p.stage_bytes, barrier = full + 8 * stage;
    barrier_expect(barrier, p.steps * (kXBytes + step_bytes + scale_bytes));
    if constexpr (Weights::kInRegisters) {
      const int tiles = p.rows / kTileRows;
      copy_box(to + weights_at, p.w, 0, tile * (step_bytes / kLineBytes), step_of(item), barrier);
      if (scale_bytes != 0) copy_box(to + scales_at, p.scales, 0, tile * tiles, step_of(item), barrier);
    } else {
      copy_boxes(p.w, to + weights_at, tile * p.rows, step_of(item), p.steps, step_bytes, barrier);
    }
  };
  const auto request_x = [&](int stage, int item) {
    copy_boxes(p.x, ring + stage * p.stage_bytes, first_row, Weights::kBoxes * step_of(item),
               Weights::kBoxes * p.steps, N * kBoxBytes, full + 8 * stage);
  };

  if (warp == 4 * kGroups && lane == 0) {
    prefetch(p.x);
    for (int i = 0; i < p.stages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4);  // the warps of the warpgroup that reads the stage
    }
    publish_barriers();
  }
  __syncthreads();
  if (!p.late_successors) start_successors();

  // All warps request stages of the first round, since a request takes time. x depends on the preceding
  // kernels, the weights do not.
  const int my_tiles = (p.tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  const int ahead = min(p.stages, my_tiles * p.items);
  if (lane == 0) {
    for (int i = warp; i < ahead; i += kThreads / 32)
      request_weights(i, blockIdx.x + i / p.items * gridDim.x, i % p.items);
  }
  wait_for_predecessors();
  if (p.late_successors) start_successors();
  if (lane == 0) {
    for (int i = warp; i < ahead; i += kThreads / 32) request_x(i, i % p.items);
  }

  if (warp == 4 * kGroups) {
    if (lane != 0) return;
    RingPosition position;
    position.advance(ahead, p.stages);
    int tile = blockIdx.x + ahead / p.items * gridDim.x, item = ahead % p.items;
    for (; tile < p.tiles; position.advance(position.item + 1, p.stages)) {
      barrier_wait(empty + 8 * position.stage, position.phase ^ 1);
      request_weights(position.stage, tile, item);
      request_x(position.stage, item);
      if (++item == p.items) item = 0, tile += gridDim.x;
    }
    return;
  }

  const int group = warp / 4;
  const int steps = slice_begin(p.total_steps, group + 1) - slice_begin(p.total_steps, group);
  // Quantized weights: rotate the assignment of tiles of 16 rows by warpgroup, so that even two tiles keep
  // all four schedulers of the multiprocessor busy with conversions.
  const int warp_tile = Weights::kInRegisters ? (warp + 2 * group) % 4 : warp % 4;
  RingPosition position;
  int first_item = 0;  // first item of the tile, counted over all tiles of this block
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, first_item += p.items) {
    const bool last = tile + static_cast<int>(gridDim.x) >= p.tiles;
    float sums[kSubtiles][N / 2] = {};
    for (int done = 0, item = group; item < p.items; done += p.steps, item += kGroups) {
      position.advance(first_item + item, p.stages);
      barrier_wait(full + 8 * position.stage, position.phase);
      const uint32 stage = ring + position.stage * p.stage_bytes;
      Step step{stage, stage + weights_at, stage + scales_at, warp_tile, lane, p.rows};
      for (int i = min(p.steps, steps - done); i > 0; --i) {
        Weights::template add<N, kSubtiles>(sums, step);
        step.x += kXBytes;
        step.weights += step_bytes;
        step.scales += scale_bytes;
      }
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(empty + 8 * position.stage);
    }

#pragma unroll
    for (int m = 0; m < kSubtiles; ++m) fence_registers(sums[m]);
#pragma unroll
    for (int first = 0; first < kSubtiles; first += kParts) {
#pragma unroll
      for (int begin = 0; begin < N; begin += kColumns) {
        if (first_row + begin >= p.result.n) break;
        float* const to =
            sums_out + (group * kColumns + lane % 4 * 2) * kHopperColumn + warp_tile * 16 + lane / 4;
#pragma unroll
        for (int m = first; m < first + kParts && m < kSubtiles; ++m) {
#pragma unroll
          for (int j = 0; j < kColumns; j += 8) {
            const float* const from = sums[m] + (begin + j) / 2;
            float* const at = to + (m - first) * kPartFloats + j * kHopperColumn;
            at[0] = from[0];
            at[kHopperColumn] = from[1];
            at[8] = from[2];
            at[kHopperColumn + 8] = from[3];
          }
        }
        threads_sync<128 * kGroups>(1);
        for (int i = threadIdx.x; i < kParts * kColumns * 32; i += 128 * kGroups) {
          const int local = i % 32 * 2, column = i / 32 % kColumns, part = i / 32 / kColumns;
          const int in_tile = 64 * (first + part) + local, row = tile * p.rows + in_tile;
          const int x_row = first_row + begin + column;
          if (x_row >= p.result.n || in_tile >= p.rows || row >= p.result.out) continue;
          float2 slices[kGroups];
#pragma unroll
          for (int slice = 0; slice < kGroups; ++slice) {
            slices[slice] = *reinterpret_cast<const float2*>(
                sums_out + part * kPartFloats + (slice * kColumns + column) * kHopperColumn + local);
          }
          const float a = (slices[0].x + slices[1].x) + (slices[2].x + slices[3].x);
          const float b = (slices[0].y + slices[1].y) + (slices[2].y + slices[3].y);
          finish_pair(p.result, x_row, row, a * Weights::scale(p, row),
                      row + 1 < p.result.out ? b * Weights::scale(p, row + 1) : 0);
        }
        if (last && first + kParts >= kSubtiles && begin + kColumns >= N) break;
        threads_sync<128 * kGroups>(1);
      }
    }
  }
}

}  // namespace

// The kernels of a storage type, by N and kSubtiles (TILES): all that linear_decode_hopper.cc launches
// (max_parts), except two more for H, in linear_decode_hopper.cu.
#define QVL_HOPPER(NAME, WEIGHTS, N, TILES)                                                            \
  extern "C" __global__ __launch_bounds__(                                                             \
      kThreads, 1) void linear_hopper_##NAME##_##N##_##TILES(const __grid_constant__ LinearHopper p) { \
    linear_decode<WEIGHTS, N, TILES>(p);                                                               \
  }
#define QVL_HOPPER_TILES(NAME, WEIGHTS, N) \
  QVL_HOPPER(NAME, WEIGHTS, N, 1) QVL_HOPPER(NAME, WEIGHTS, N, 2) QVL_HOPPER(NAME, WEIGHTS, N, 3)
#define QVL_HOPPER_WIDE(NAME, WEIGHTS) \
  QVL_HOPPER_TILES(NAME, WEIGHTS, 8)   \
  QVL_HOPPER_TILES(NAME, WEIGHTS, 16)  \
  QVL_HOPPER(NAME, WEIGHTS, 32, 1)     \
  QVL_HOPPER(NAME, WEIGHTS, 32, 2)     \
  QVL_HOPPER(NAME, WEIGHTS, 64, 1)

}  // namespace qvl::cuda

#endif
