// Attention of 128 queries on Hopper: wgmma, for any source of keys and values with head_dim up to 128.
//
// Layout. Two warpgroups have 64 queries each; a third one loads tiles of 128 keys and their values into two
// buffers, depending on the source: by the copy engine, by cp.async, or by loads and a conversion to H. Rows
// of head_dim values are divided into columns of 64 values, [column][row] of 128 bytes, the layout of
// wgmma_descriptor() in hopper.cuh. D is kPaddedDim, rounded up to a multiple of 64; "offsets" are those of
// keys and their scales in the cache, if the source uses them:
//
//   shared:  queries [D / 64][128][64]  |  keys [2][D / 64][128][64]  |  values [2][..]  |  offsets, barriers
//
//   warpgroups 0, 1
//     tensor cores:    scores(0)             | scores(1)  p v(0)      | scores(2)  p v(1)      | ..
//     other units:                softmax(0) |            softmax(1)  |            softmax(2)  | ..
//   warpgroup 2:       loads tiles 0, 1, 2 ..
//
// p v(i): the product of the weights p, the result of softmax(i), and the values of tile i.
//
// As in attention.cuh, the bits of a query's result do not depend on the other queries.
//
// Cost of a tile of 128 keys and 128 queries at head_dim 128, in cycles of a multiprocessor: 2048 of wgmma,
// for 4 * head_dim operations per query and key; 1024 of exponentials, at the same time. Bound by the tensor
// cores.
//
// Reference: float64 in PyTorch, tests/cuda/test_prompt_attention.py (`portable` False).
#pragma once

#include "cuda/kernels/attention.cuh"
#include "cuda/kernels/hopper.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace qvl::cuda {

// Layout of queries, keys or values in shared memory, for wgmma_descriptor(). at(): offset, in values, of
// values d to d + 7 of a row; d is a multiple of 8.
template <int kPaddedDim>
struct SwizzledRows {
  static constexpr int kDims = (kPaddedDim + 15) / 16 * 16, kKeys = kHopperKeys;
  __device__ static int at(int row, int d) {
    return (d / 64 * kKeys + row) * 64 + (d % 64 / 8 ^ row % 8) * 8;
  }
};

// Attention of a job's queries. kPaddedDim: a multiple of 8, at least head_dim, for which hopper.cuh has
// ProductRegisters. `source` has locate() and load() as for attend() (attention.cuh), called by the 128
// threads of the third warpgroup, and three more functions. use_tensor_map(): whether the copy engine can
// load keys and values. If so, copy<columns>(to, part, tile, barrier) requests the keys or values of a tile,
// in columns of kHopperKeys rows, and column_bytes(tile) is the number of bytes that it copies per column. It
// may omit rows beyond the last key or write anything there: their scores are masked, and their values are
// set to zero here.
template <int kPaddedDim, typename Source>
__device__ inline void attend_hopper(const Job& job, const Source& source) {
  using Rows = SwizzledRows<kPaddedDim>;
  constexpr int kKeys = kHopperKeys, kColumn = kKeys * 128, kTile = (kPaddedDim + 63) / 64 * kColumn;
  extern __shared__ char raw_shared[];
  char* const aligned = raw_shared + (-shared_address(raw_shared) & 1023);
  const uint32 queries = shared_address(aligned), keys = queries + kTile, values = keys + 2 * kTile;
  const uint32 barriers = values + 2 * kTile + kKeys * 16;
  // full and empty: barriers of keys (part 0) and values (part 1), for each of the two buffers. filled:
  // barrier of the copy of the values of an incomplete last tile; after the copy the rows beyond the last key
  // are set to zero.
  const uint32 filled = barriers + 64;
  auto full = [&](int part, int tile) { return barriers + 8 * (2 * part + tile % 2); };
  auto empty = [&](int part, int tile) { return barriers + 32 + 8 * (2 * part + tile % 2); };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, thread = threadIdx.x % 128;
  const int tiles = (job.n_keys + kKeys - 1) / kKeys;

  // What arrives: at `full` the lane that requests copies, or the 128 threads that load; at `empty` one lane
  // of each of the 8 warps that compute.
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; ++i) {
      barrier_init(barriers + 8 * i, source.use_tensor_map() ? 1 : 128);
      barrier_init(barriers + 32 + 8 * i, 8);
    }
    barrier_init(filled, 1);
    publish_barriers();
  }
  __syncthreads();

  // Registers: 128 threads with 72 each and 256 with 216 each have 64,512 of the 65,536 of a multiprocessor.
  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(72));
    if (source.use_tensor_map()) {
      if (warp > 8) return;
      for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll 1
        for (int part = 0; part < 2; ++part) {
          barrier_wait(empty(part, tile), tile / 2 % 2 ^ 1);
          // Values beyond the last key have weight 0, but must not be NaN or infinite: they are set to zero.
          const int n_keys = job.n_keys - tile * kKeys;
          const bool fill = part == 1 && n_keys < kKeys;
          if (lane == 0) {
            const uint32 barrier = fill ? filled : full(part, tile);
            barrier_expect(barrier, source.column_bytes(tile) * ((kPaddedDim + 63) / 64));
            source.template copy<(kPaddedDim + 63) / 64>(
                part == 0 ? keys + tile % 2 * kTile : values + tile % 2 * kTile, part, tile, barrier);
          }
          if (fill) {
            barrier_wait(filled, 0);
            H* const to = reinterpret_cast<H*>(aligned + (3 + tile % 2) * kTile);
            for (int i = lane; i < (kKeys - n_keys) * (Rows::kDims / 8); i += 32) {
              const int row = n_keys + i / (Rows::kDims / 8), d = i % (Rows::kDims / 8) * 8;
              *reinterpret_cast<uint4*>(to + Rows::at(row, d)) = make_uint4(0, 0, 0, 0);
            }
            publish_writes();
            __syncwarp();
            if (lane == 0) barrier_arrive(full(1, tile));
          }
        }
      }
      return;
    }
    for (int tile = 0; tile < tiles; ++tile) {
      warpgroup_sync(1);
      source.locate(tile * kKeys, kKeys, thread);
      warpgroup_sync(1);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        barrier_wait(empty(part, tile), tile / 2 % 2 ^ 1);
        H* const to = reinterpret_cast<H*>(aligned + (1 + 2 * part + tile % 2) * kTile);
        source.template load<Rows>(to, part, tile * kKeys, thread);
        commit_copies();
        wait_for_copies<0>();
        publish_writes();
        barrier_arrive(full(part, tile));
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(216));
  const int group = warp / 4, row = group * 64 + warp % 4 * 16 + lane / 4;
  for (int i = thread; i < 64 * Rows::kDims / 8; i += 128) {
    const int query = group * 64 + i / (Rows::kDims / 8), d = i % (Rows::kDims / 8) * 8;
    uint4 vector = make_uint4(0, 0, 0, 0);
    const H* const from = job.q + query * job.q_stride + d;
    if (query < job.n && d < job.head_dim) {
      if (job.head_dim % 8 == 0 && job.q_stride % 8 == 0 && reinterpret_cast<uint64>(job.q) % 16 == 0) {
        vector = *reinterpret_cast<const uint4*>(from);
      } else {
        uint32* const pairs = &vector.x;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (d + 2 * j < job.head_dim) pairs[j] = *reinterpret_cast<const uint32*>(from + 2 * j);
        }
      }
    }
    *reinterpret_cast<uint4*>(aligned + 2 * Rows::at(query, d)) = vector;
  }
  publish_writes();
  warpgroup_sync(2 + group);

  float scores[kKeys / 2], sums[kPaddedDim / 2] = {};
  uint32 weights[kKeys / 16][4];
  float maximum[2] = {minus_infinity(), minus_infinity()}, total[2] = {0, 0}, factor[2];
  const float scale = job.scale * kLog2E;

  // Begin the product of the queries and the keys of a tile. When it has ended, release(0, tile) allows the
  // third warpgroup to overwrite the keys.
  auto score = [&](int tile) {
    barrier_wait(full(0, tile), tile / 2 % 2);
    wgmma_fence();
    const uint64 a = wgmma_descriptor(queries + group * 64 * 128),
                 b = wgmma_descriptor(keys + tile % 2 * kTile);
#pragma unroll
    for (int k = 0; k < (kPaddedDim + 15) / 16; ++k) {
      const int step = (k / 4 * kColumn + k % 4 * 32) / 16;
      Product<kKeys>::run(scores, a + step, b + step, k != 0);
    }
    wgmma_commit();
  };
  auto release = [&](int part, int tile) {
    if (lane == 0) barrier_arrive(empty(part, tile));
  };
  // Convert the scores of a tile to weights. Set `factor`, by which the sums of earlier tiles must be
  // multiplied.
  auto compute_weights = [&](int tile) {
    const int first = tile * kKeys;
    const bool unmasked =
        first + kKeys <= (job.causal ? job.first_position + group * 64 + warp % 4 * 16 + 1 : job.n_keys);
    if (!unmasked) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        const int key = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
        const int n_visible = job.causal ? job.first_position + row + i / 2 % 2 * 8 + 1 : job.n_keys;
        if (key >= n_visible) scores[i] = minus_infinity();
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_maximum = maximum[half];
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 4) {
        new_maximum = fmaxf(new_maximum, fmaxf(scores[i + 2 * half], scores[i + 2 * half + 1]));
      }
      new_maximum = fmaxf(new_maximum, __shfl_xor_sync(0xFFFFFFFFu, new_maximum, 1));
      new_maximum = fmaxf(new_maximum, __shfl_xor_sync(0xFFFFFFFFu, new_maximum, 2));
      factor[half] = fast_exp2((maximum[half] - new_maximum) * scale);
      const float shift = new_maximum * scale;
      maximum[half] = new_maximum;
      total[half] *= factor[half];
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 4) {
        scores[i + 2 * half] = fast_exp2(scores[i + 2 * half] * scale - shift);
        scores[i + 2 * half + 1] = fast_exp2(scores[i + 2 * half + 1] * scale - shift);
        total[half] += scores[i + 2 * half] + scores[i + 2 * half + 1];
      }
    }
  };
  // Round the weights to H, as left operand of their product with the values.
  auto pack = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i)
      weights[i / 4][i % 4] = as_bits(to_half2(scores[2 * i], scores[2 * i + 1]));
  };

  auto add_values = [&](int tile) {
    barrier_wait(full(1, tile), tile / 2 % 2);
    wgmma_fence();
    const uint64 v = wgmma_descriptor(values + tile % 2 * kTile, kColumn);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      ProductRegisters<kPaddedDim>::run(sums, weights[k], v + k * 16 * 128 / 16);
    wgmma_commit();
  };

  score(0);
  wgmma_wait<0>();
  fence_registers(scores);
  release(0, 0);
  compute_weights(0);
  pack();
  for (int tile = 0; tile + 1 < tiles; ++tile) {
    score(tile + 1);
    add_values(tile);
    wgmma_wait<1>();
    fence_registers(scores);
    release(0, tile + 1);
    compute_weights(tile + 1);
    wgmma_wait<0>();
    fence_registers(sums);
    release(1, tile);
#pragma unroll
    for (int i = 0; i < kPaddedDim / 2; ++i) sums[i] *= factor[i / 2 % 2];
    pack();
  }
  add_values(tiles - 1);
  wgmma_wait<0>();
  fence_registers(sums);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xFFFFFFFFu, total[half], 1);
    total[half] += __shfl_xor_sync(0xFFFFFFFFu, total[half], 2);
    const int query = row + 8 * half;
    if (query >= job.n) continue;
    const float inverse = 1 / total[half];
#pragma unroll
    for (int i = 0; i < kPaddedDim / 2; i += 4) {
      const int column = i * 2 + lane % 4 * 2;
      if (column >= job.head_dim) continue;
      *reinterpret_cast<H2*>(job.y + query * job.y_stride + column) =
          to_half2(sums[i + 2 * half] * inverse, sums[i + 2 * half + 1] * inverse);
    }
  }
}

}  // namespace qvl::cuda

#endif
