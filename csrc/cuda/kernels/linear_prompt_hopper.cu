// Products of prompts on Hopper, y = x W^T with x and W in H: wgmma on tiles loaded by the copy engine (TMA).
//
// Layout. A block computes 64 * kGroups rows of W x kTokens tokens: kGroups warpgroups of 64 rows each, and
// one more, of which one thread requests copies. Steps of 64 values of k pass through kStages buffers, in
// rows of 128 bytes swizzled by the copy engine:
//
//   buffer:  W [64 * kGroups][64]  |  x [kTokens][64]      barriers: full, empty
//
//   a cluster of kClusterRows x kClusterTokens blocks, here for example 2 x 2:
//
//                 x tile 0    x tile 1
//   W tile 0    | block 0   | block 2 |      blocks of a row share W, those of a column share x: each
//   W tile 1    | block 1   | block 3 |      requests a part of both tiles and multicasts it to the others
//
// Clusters iterate over the tiles, tokens first, so that W is read from memory once and x stays in the L2
// cache. Each sum has one accumulator and adds ascending steps of 16 values of k in every variant: the bits
// of the result do not depend on the choice of tile.
//
// Cost of a step, in cycles of a multiprocessor: 2 * kGroups * kTokens of wgmma (64 x 8 x 16 products in 4
// cycles), against 128 * (64 * kGroups + kTokens) bytes at 47 bytes per cycle, with and without multicast:
// multicast only reduces the load of the L2 cache. Larger tiles copy fewer bytes per product, but with fewer
// tiles than multiprocessors some of these are idle. linear_prompt.cc chooses the variant by an estimate
// (cycles()), mainly max(2.25 * kGroups * kTokens, bytes / 47) per step, times the number of rounds, in each
// of which a block computes a tile; 2.25 in place of 2, since wgmma reaches 8 / 9 of its peak rate.
//
// Reference: float64 in PyTorch, and the same bits for every tile, tests/cuda/test_prompt_linear.py.
#include "cuda/kernels/hopper.cuh"
#include "cuda/kernels/linear_prompt.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace qvl::cuda {

constexpr int kChunk = 32;         // tokens that the epilogue processes at a time, through shared memory
constexpr int kChunkRow = 64 + 4;  // floats from a token of the chunk to the next; + 4: no bank conflicts
constexpr int kChunkBytes = kChunk * kChunkRow * 4;

// Finish four adjacent columns of kFinishRows rows of y: row, row + 8 and so on. chunk: sums of the first
// row; those of the next rows are 8 rows of the chunk apart. The branches on the epilogue are outside the
// loops: the code must fit the instruction cache.
template <int kFinishRows>
__device__ inline void finish_four(const Result& p, int row, int column, const float* chunk, float4 bias) {
  float4 v[kFinishRows];
#pragma unroll
  for (int j = 0; j < kFinishRows; ++j) {
    v[j] = *reinterpret_cast<const float4*>(chunk + j * 8 * kChunkRow);
    v[j].x += bias.x, v[j].y += bias.y, v[j].z += bias.z, v[j].w += bias.w;
  }
  const int valid = column < p.out ? (p.n - row + 7) / 8 : 0;
  const int64 step = static_cast<int64>(8) * p.out, at = static_cast<int64>(row) * p.out + column;
  if (p.epilogue == kEpilogueSiluTimes) {
    H2* const y = static_cast<H2*>(p.y) + at / 4;
#pragma unroll
    for (int j = 0; j < kFinishRows; ++j) {
      if (j < valid) y[j * step / 4] = to_half2(silu_times(v[j].x, v[j].y), silu_times(v[j].z, v[j].w));
    }
  } else if (p.epilogue == kEpilogueFloat) {
    float* const y = static_cast<float*>(p.y) + at;
#pragma unroll
    for (int j = 0; j < kFinishRows; ++j) {
      if (j < valid) *reinterpret_cast<float4*>(y + j * step) = v[j];
    }
  } else if (p.epilogue == kEpilogueAdd) {
    float* const y = static_cast<float*>(p.y) + at;
#pragma unroll
    for (int j = 0; j < kFinishRows; ++j) {
      // The addition is done in the L2 cache, so that the thread does not wait for a load of y.
      if (j < valid) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(y + j * step), "f"(v[j].x),
                     "f"(v[j].y), "f"(v[j].z), "f"(v[j].w)
                     : "memory");
      }
    }
  } else {
    if (p.epilogue == kEpilogueGelu) {
#pragma unroll
      for (int j = 0; j < kFinishRows; ++j)
        v[j] = make_float4(gelu(v[j].x), gelu(v[j].y), gelu(v[j].z), gelu(v[j].w));
    }
    H* const y = static_cast<H*>(p.y) + at;
#pragma unroll
    for (int j = 0; j < kFinishRows; ++j) {
      H2 pairs[2] = {to_half2(v[j].x, v[j].y), to_half2(v[j].z, v[j].w)};
      if (j < valid) *reinterpret_cast<uint2*>(y + j * step) = *reinterpret_cast<uint2*>(pairs);
    }
  }
}

template <int kGroups, int kTokens, int kClusterRows, int kClusterTokens, int kStages>
__device__ inline void linear(const LinearTensors& p) {
  constexpr int kRows = 64 * kGroups, kBlocks = kClusterRows * kClusterTokens,
                kPeers = kClusterRows + kClusterTokens - 1;
  constexpr int kBytesW = kRows * 128, kBytesX = kTokens * 128;
  // Tokens per instruction. An instruction may use only the registers that a thread has initially, 128 with
  // four warpgroups (three and the one that copies).
  constexpr int kWidth = kGroups == 3 && kTokens > 144 ? kTokens / 2 : kTokens;
  static_assert(kRows / kClusterTokens % 8 == 0 && kTokens % (8 * kClusterRows) == 0,
                "parts of tiles are whole groups of 8 rows");
  extern __shared__ char raw[];
  // The same offset in every block of a cluster, for multicast.
  char* const aligned = raw + (-static_cast<uint32>(__cvta_generic_to_shared(raw)) & 1023);
  const uint32 tiles_w = static_cast<uint32>(__cvta_generic_to_shared(aligned));
  const uint32 tiles_x = tiles_w + kStages * kBytesW;
  float* const chunks = reinterpret_cast<float*>(aligned + kStages * (kBytesW + kBytesX));
  const uint32 full = tiles_x + kStages * kBytesX + kGroups * kChunkBytes, empty = full + 8 * kStages;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = kBlocks > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int rank_m = rank % kClusterRows,
            rank_n = rank / kClusterRows;  // position in the cluster: rows, tokens
  // A group here is not a warpgroup but the tiles that a cluster computes at a time.
  const int first_group = blockIdx.x / kBlocks, stride = gridDim.x / kBlocks;
  const int groups = p.m_groups * p.n_groups;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kGroups * kPeers);
    }
    publish_barriers();
  }
  if (kBlocks > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  start_successors();

  // Registers per thread: the warpgroup that copies gives up some, which the others get. In total they are
  // at most the 65,536 of a multiprocessor.
  if (warp >= 4 * kGroups) {
    if (kGroups > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kGroups == 4 ? 24 : 40));
    if (warp == 4 * kGroups && lane == 0) {
      constexpr int kPartW = kRows / kClusterTokens, kPartX = kTokens / kClusterRows;
      uint32 w_mask = 0, x_mask = 0;  // masks of the blocks that receive this block's parts
      for (int i = 0; i < kClusterTokens; ++i) w_mask |= 1u << (rank_m + kClusterRows * i);
      for (int i = 0; i < kClusterRows; ++i) x_mask |= 1u << (i + kClusterRows * rank_n);
      auto copy_w = [&](int slot, int group, int step) {
        const int row = (group / p.n_groups * kClusterRows + rank_m) * kRows + rank_n * kPartW;
        const uint32 to = tiles_w + slot * kBytesW + rank_n * kPartW * 128;
        if (kClusterTokens > 1) {
          copy_box_to(to, p.w, step * 64, row, full + 8 * slot, w_mask);
        } else {
          copy_box(to, p.w, step * 64, row, full + 8 * slot);
        }
      };
      auto copy_x = [&](int slot, int group, int step) {
        const int row = (group % p.n_groups * kClusterTokens + rank_n) * kTokens + rank_m * kPartX;
        const uint32 to = tiles_x + slot * kBytesX + rank_m * kPartX * 128;
        if (kClusterRows > 1) {
          copy_box_to(to, p.x, step * 64, row, full + 8 * slot, x_mask);
        } else {
          copy_box(to, p.x, step * 64, row, full + 8 * slot);
        }
      };
      // Unless the preceding kernel writes the weights (p.written), as dequantization does, the first of them
      // are requested before it ends.
      if (p.written) wait_for_predecessors();
      const int ahead = first_group < groups ? min(kStages, p.steps) : 0;
      for (int i = 0; i < ahead; ++i) {
        barrier_expect(full + 8 * i, kBytesW + kBytesX);
        copy_w(i, first_group, i);
      }
      wait_for_predecessors();
      for (int i = 0; i < ahead; ++i) copy_x(i, first_group, i);
      int slot = ahead % kStages;
      uint32 phase = ahead == kStages ? 1 : 0;  // parity of the number of rounds over the slots
      for (int group = first_group; group < groups; group += stride) {
        for (int step = group == first_group ? ahead : 0; step < p.steps; ++step) {
          barrier_wait(empty + 8 * slot, phase ^ 1);
          barrier_expect(full + 8 * slot, kBytesW + kBytesX);
          copy_w(slot, group, step);
          copy_x(slot, group, step);
          if (++slot == kStages) slot = 0, phase ^= 1;
        }
      }
    }
  } else {
    if (kGroups > 1)
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kGroups == 2   ? 224
                                                               : kGroups == 3 ? 152
                                                                              : 112));
    const int part = warp / 4, thread = threadIdx.x % 128;
    float* const chunk = chunks + part * kChunk * kChunkRow;
    // Each of the first kPeers warps of a warpgroup notifies one block when a slot has been read: the first
    // kClusterTokens warps the blocks that share rows of W with this block (itself included), the next warps
    // the other blocks that share its tokens. Each notified block also writes to the slot of this block, and
    // waits for the notification.
    const int peer = warp % 4;
    const int notified =
        peer < kClusterTokens
            ? rank_m + kClusterRows * peer
            : (peer - kClusterTokens < rank_m ? peer - kClusterTokens : peer - kClusterTokens + 1) +
                  kClusterRows * rank_n;
    static_assert(kPeers <= 4, "each warp notifies at most one block");
    auto release = [&](int slot) {
      if (lane == 0 && peer < kPeers) barrier_arrive(empty + 8 * slot, notified);
    };
    float sums[kTokens / 2];
    int slot = 0;
    uint32 phase = 0;
    for (int group = first_group; group < groups; group += stride) {
      for (int step = 0; step < p.steps; ++step) {
        barrier_wait(full + 8 * slot, phase);
        const uint64 w = wgmma_descriptor(tiles_w + slot * kBytesW + part * 64 * 128);
        const uint64 x = wgmma_descriptor(tiles_x + slot * kBytesX);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int j = 0; j < kTokens / kWidth; ++j) {
            Product<kWidth>::run(sums + j * kWidth / 2, w + 2 * k, x + 2 * k + j * kWidth * 8, step + k != 0);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(slot == 0 ? kStages - 1 : slot - 1);
        if (++slot == kStages) slot = 0, phase ^= 1;
      }
      wgmma_wait<0>();
      release(slot == 0 ? kStages - 1 : slot - 1);
      fence_registers(sums);

      const int first_out = (group / p.n_groups * kClusterRows + rank_m) * kRows + part * 64;
      const int first_token = (group % p.n_groups * kClusterTokens + rank_n) * kTokens;
      const int column = first_out + thread % 16 * 4;
      const bool by_four = p.result.out % 4 == 0;
      float4 bias = make_float4(0, 0, 0, 0);
      if (by_four && p.result.bias != nullptr && column < p.result.out) {
        bias = *reinterpret_cast<const float4*>(p.result.bias + column);
      }
#pragma unroll 1
      for (int i = 0; i < kTokens && first_token + i < p.result.n; i += kChunk) {
        warpgroup_sync(1 + part);
        float* const to = chunk + lane % 4 * 2 * kChunkRow + peer * 16 + lane / 4;
#pragma unroll
        for (int c = 0; c < kTokens; c += kChunk) {
          if (c != i) continue;
#pragma unroll
          for (int j = 0; j < kChunk && c + j < kTokens; j += 8) {
            to[j * kChunkRow] = sums[(c + j) / 2];
            to[(j + 1) * kChunkRow] = sums[(c + j) / 2 + 1];
            to[j * kChunkRow + 8] = sums[(c + j) / 2 + 2];
            to[(j + 1) * kChunkRow + 8] = sums[(c + j) / 2 + 3];
          }
        }
        warpgroup_sync(1 + part);
        const int token = first_token + i + thread / 16, end = min(p.result.n, first_token + kTokens);
        const float* const from = chunk + thread / 16 * kChunkRow + thread % 16 * 4;
        if (by_four) {
          Result result = p.result;
          result.n = end;
          finish_four<kChunk / 8>(result, token, column, from, bias);
        } else {
          for (int j = 0; j < kChunk && token + j < end; j += 8) {
            const float* const v = from + j * kChunkRow;
            if (column < p.result.out) finish_pair(p.result, token + j, column, v[0], v[1]);
            if (column + 2 < p.result.out) finish_pair(p.result, token + j, column + 2, v[2], v[3]);
          }
        }
      }
    }
  }
  if (kBlocks > 1) cluster_sync();  // other blocks may still arrive at barriers of this block
}

#define QVL_LINEAR(C, N, CM, CN, S, BLOCKS)                                                          \
  extern "C" __global__ void __cluster_dims__(CM* CN, 1, 1) __launch_bounds__(128 * (C + 1), BLOCKS) \
      linear_prompt_##C##x##N##_##CM##x##CN(const __grid_constant__ LinearTensors p) {               \
    linear<C, N, CM, CN, S>(p);                                                                      \
  }
#include "cuda/kernels/linear_prompt_tiles.h"

}  // namespace qvl::cuda

#endif
