// Attention of 64 queries over tiles of keys, for any source of keys and values: tensor cores through
// mma.sync from sm_80 on, plain loops on older GPUs. Hopper uses attention_hopper.cuh instead, except for
// prompts with head_dim over 128. attention_prompt.cu and attention_dense.cu define the sources.
//
// Layout. A block has 4 warps of 16 queries. The scores q k^T of a tile of keys stay in registers, 16 x 64
// per warp, with a running maximum and sum per query; they become the weights p, which multiply the values v.
// Two buffers of keys and values, filled by cp.async where the source allows it. D is kPaddedDim, head_dim
// with padding:
//
//               tile of 64 keys (32 for head_dim over 128); m, m': old and new maximum, s: scores
//   warp 0  16 queries | scores [16][64] in registers |      online softmax: m' = max(m, s),
//   warp 1  16         |                              |      sums *= exp2(m - m'), sums += p v
//   ..
//   shared:  queries [64][D + 8]  |  2 x (keys [64][D + 8], values [64][D + 8])  |  offsets of keys in the
//            cache (prompts only); for head_dim over 128 in the last 8 values of the queries' rows
//
// Tiles of keys start at multiples of their size, and a tile in which all keys are masked for a query does
// not change the bits of the query's result (its sums are multiplied by 1, weights are 0): the result depends
// only on the query, its position, and its keys and their values, not on the other queries.
//
// Cost. Operations: 4 * head_dim per query and key on the tensor cores, and one exponential per query and
// key. A multiprocessor computes 16 exponentials per cycle; on sm_80 at head_dim 128 they take a quarter of
// the time of the tensor cores. Bytes: keys and values once per 64 queries, from the L2 cache. Bound by the
// tensor cores.
//
// Reference: float64 in PyTorch, tests/cuda/test_prompt_attention.py.
#pragma once

#include "cuda/kernels/attention_prompt.h"
#include "cuda/kernels/mma.cuh"

namespace qvl::cuda {

constexpr int kAttentionWarps = kAttentionThreads / 32;
constexpr float kLog2E = 1.44269504f;

__device__ inline float minus_infinity() {
  return __int_as_float(0xFF800000);
}

// Work of a block: n queries. Query i begins at q + i * q_stride and attends to keys 0 to first_position + i
// if causal (n_keys is then first_position + n), else to all n_keys; its result is written to
// y + i * y_stride. Scores are multiplied by `scale`.
struct Job {
  const H* q;
  H* y;
  int64 q_stride, y_stride;
  int n, n_keys, head_dim;
  int first_position;
  bool causal;
  float scale;
};

#if __CUDA_ARCH__ >= 800

// 2^a; 0 for -infinity.
__device__ inline float fast_exp2(float a) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

// Layout of keys or values in shared memory: rows of kPaddedDim + 8 values, so that ldmatrix is free of bank
// conflicts. at(): offset of values d to d + 7 of a row; d is a multiple of 8.
template <int kPaddedDim>
struct PaddedRows {
  static constexpr int kDims = kPaddedDim, kKeys = kAttentionKeys<kPaddedDim>;
  __device__ static int at(int row, int d) { return row * (kPaddedDim + 8) + d; }
};

// Attention of a job's queries. kPaddedDim: a multiple of 16, at least head_dim. `source` provides the keys
// (part 0) and values (part 1). Before sm_80, value(part, key, d) returns one value of a key or value vector.
// From sm_80 on there are two functions, which 128 threads call together:
//
//   locate(first, n, thread)              looks up the addresses of n keys from `first` on, up to the last
//                                         key of the job; may write to shared memory
//   load<Rows>(to, part, first, thread)   after locate and a barrier: writes keys or values `first` to
//                                         first + Rows::kKeys - 1 to the offsets Rows::at, and zeros beyond
//                                         the last key and beyond head_dim; may use copy_async
template <int kPaddedDim, typename Source>
__device__ inline void attend(const Job& job, const Source& source) {
  using Rows = PaddedRows<kPaddedDim>;
  constexpr int kRow = kPaddedDim + 8, kKeys = Rows::kKeys, kQueries = kAttentionQueries;
  constexpr bool kKeepQueries = kPaddedDim <= 128;  // in registers
  extern __shared__ __align__(16) char raw_shared[];
  H* const queries = reinterpret_cast<H*>(raw_shared);
  H* const buffers = queries + kQueries * kRow;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = (job.n_keys + kKeys - 1) / kKeys;

  auto load = [&](int tile, int part) {
    if (tile < tiles) {
      source.template load<Rows>(buffers + (tile % 2 * 2 + part) * kKeys * kRow, part, tile * kKeys,
                                 threadIdx.x);
    }
    commit_copies();  // beyond the last tile an empty group, since wait_for_copies() counts groups
  };
  source.locate(0, kKeys, threadIdx.x);
  __syncthreads();
  load(0, 0);
  for (int i = threadIdx.x; i < kQueries * kPaddedDim / 2; i += kAttentionThreads) {
    const int row = i / (kPaddedDim / 2), column = i % (kPaddedDim / 2) * 2;
    H2 value = to_half2(0, 0);
    if (row < job.n && column < job.head_dim) {
      value = *reinterpret_cast<const H2*>(job.q + row * job.q_stride + column);
    }
    *reinterpret_cast<H2*>(queries + row * kRow + column) = value;
  }
  load(0, 1);
  __syncthreads();
  source.locate(kKeys, kKeys, threadIdx.x);
  __syncthreads();
  const H* const my_queries = queries + (warp * 16 + lane % 16) * kRow + lane / 16 * 8;
  uint32 q[kPaddedDim / 16][4];
  if (kKeepQueries) {
#pragma unroll
    for (int k = 0; k < kPaddedDim / 16; ++k) load_matrices(q[k], my_queries + 16 * k);
  }

  float sums[kPaddedDim / 8][4] = {};
  float maximum[2] = {minus_infinity(), minus_infinity()}, total[2] = {0, 0};
  const int row = warp * 16 + lane / 4;
  const float scale = job.scale * kLog2E;
  for (int tile = 0; tile < tiles; ++tile) {
    load(tile + 1, 0);
    load(tile + 1, 1);
    wait_for_copies<3>();  // this tile's keys; its values and the next tile may still be in flight
    __syncthreads();
    const H* const keys = buffers + tile % 2 * 2 * kKeys * kRow;
    const H* const values = keys + kKeys * kRow;
    float scores[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kPaddedDim / 16; ++k) {
      uint32 loaded[4];
      if (!kKeepQueries) load_matrices(loaded, my_queries + 16 * k);
      const uint32(&a)[4] = kKeepQueries ? q[k] : loaded;
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32 b[4];
        load_matrices(b, keys + (16 * j + lane / 16 * 8 + lane % 8) * kRow + 16 * k + lane / 8 % 2 * 8);
        multiply(scores[2 * j], a, b[0], b[1]);
        multiply(scores[2 * j + 1], a, b[2], b[3]);
      }
    }
    const int first = tile * kKeys;
    const bool unmasked = first + kKeys <= (job.causal ? job.first_position + 1 : job.n_keys);
    if (!unmasked) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = first + 8 * j + lane % 4 * 2 + i % 2;
          const int n_visible = job.causal ? job.first_position + row + i / 2 * 8 + 1 : job.n_keys;
          if (key >= n_visible) scores[j][i] = minus_infinity();
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_maximum = maximum[half];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        new_maximum = fmaxf(new_maximum, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      }
      new_maximum = fmaxf(new_maximum, __shfl_xor_sync(0xFFFFFFFFu, new_maximum, 1));
      new_maximum = fmaxf(new_maximum, __shfl_xor_sync(0xFFFFFFFFu, new_maximum, 2));
      const float factor = fast_exp2((maximum[half] - new_maximum) * scale), shift = new_maximum * scale;
      maximum[half] = new_maximum;
      total[half] *= factor;
#pragma unroll
      for (int j = 0; j < kPaddedDim / 8; ++j) sums[j][2 * half] *= factor, sums[j][2 * half + 1] *= factor;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        scores[j][2 * half] = fast_exp2(scores[j][2 * half] * scale - shift);
        scores[j][2 * half + 1] = fast_exp2(scores[j][2 * half + 1] * scale - shift);
        total[half] += scores[j][2 * half] + scores[j][2 * half + 1];
      }
    }
    wait_for_copies<2>();  // this tile's values
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint32 a[4] = {as_bits(to_half2(scores[2 * k][0], scores[2 * k][1])),
                           as_bits(to_half2(scores[2 * k][2], scores[2 * k][3])),
                           as_bits(to_half2(scores[2 * k + 1][0], scores[2 * k + 1][1])),
                           as_bits(to_half2(scores[2 * k + 1][2], scores[2 * k + 1][3]))};
#pragma unroll
      for (int j = 0; j < kPaddedDim / 16; ++j) {
        uint32 b[4];
        load_matrices_transposed(b, values + (16 * k + lane % 16) * kRow + 16 * j + lane / 16 * 8);
        multiply(sums[2 * j], a, b[0], b[1]);
        multiply(sums[2 * j + 1], a, b[2], b[3]);
      }
    }
    source.locate((tile + 2) * kKeys, kKeys, threadIdx.x);
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xFFFFFFFFu, total[half], 1);
    total[half] += __shfl_xor_sync(0xFFFFFFFFu, total[half], 2);
    const int query = row + 8 * half;
    if (query >= job.n) continue;
    const float factor = 1 / total[half];
#pragma unroll
    for (int j = 0; j < kPaddedDim / 8; ++j) {
      const int column = 8 * j + lane % 4 * 2;
      if (column >= job.head_dim) continue;
      *reinterpret_cast<H2*>(job.y + query * job.y_stride + column) =
          to_half2(sums[j][2 * half] * factor, sums[j][2 * half + 1] * factor);
    }
  }
}

#else

// Version for GPUs before sm_80: a warp processes one query at a time, key by key; its lanes share the
// dimensions.
template <int kPaddedDim, typename Source>
__device__ inline void attend(const Job& job, const Source& source) {
  constexpr int kLaneDims = (kPaddedDim + 31) / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < job.n; i += kAttentionWarps) {
    const int n_visible = job.causal ? job.first_position + i + 1 : job.n_keys;
    float q[kLaneDims], sums[kLaneDims] = {}, maximum = minus_infinity(), total = 0;
    for (int j = 0; j < kLaneDims; ++j) {
      const int d = lane + 32 * j;
      q[j] = d < job.head_dim ? to_float(job.q[i * job.q_stride + d]) * job.scale : 0.f;
    }
    for (int key = 0; key < n_visible; ++key) {
      float score = 0;
      for (int j = 0; j < kLaneDims; ++j) {
        if (lane + 32 * j < job.head_dim) score += q[j] * to_float(source.value(0, key, lane + 32 * j));
      }
      score = warp_sum(score);
      const float new_maximum = fmaxf(maximum, score), factor = __expf(maximum - new_maximum),
                  weight = __expf(score - new_maximum);
      maximum = new_maximum;
      total = total * factor + weight;
      for (int j = 0; j < kLaneDims; ++j) {
        const int d = lane + 32 * j;
        if (d < job.head_dim) sums[j] = sums[j] * factor + weight * to_float(source.value(1, key, d));
      }
    }
    for (int j = 0; j < kLaneDims; ++j) {
      const int d = lane + 32 * j;
      if (d < job.head_dim) job.y[i * job.y_stride + d] = to_half(sums[j] / total);
    }
  }
}

#endif

}  // namespace qvl::cuda
