// Attention of one query over the keys of its sequence, in the blocks of the paged cache.
//
// Cost. Bytes: each key and value once, 512 a head and token in bfloat16; 300 tokens of one sequence with 32
// heads are 4.9 MB, 1.1 us on an H200, 2000 tokens of 32 sequences 1.05 GB, 245 us. 0.5 multiplications a
// byte: the plain units do.
//
// Layout. A block takes a chunk of 128 keys of a head and a sequence, a warp 32 of them. The warp has all its
// keys and values copied to shared memory at once, each lane into its own place, as in linear_decode.cu: 64
// KB under way a block, three blocks a multiprocessor. 16 bytes of a key a lane: 16 lanes share a key in 16
// bits, 8 in 8 bits. Warps, and in a second kernel chunks, are put together in a fixed order. Chunks begin at
// multiples of 128 tokens, so that a row depends on its own keys alone.
//
// attention_decode_any takes every head_dim up to 256, value by value.
#include "cuda/kernels/attention_decode.h"
#include "cuda/kernels/stored.cuh"
#include "cuda/kernels/streams.cuh"

namespace qvl::cuda {
namespace {

constexpr int kChunk = 128, kWarps = 4, kThreads = 32 * kWarps, kWarpKeys = kChunk / kWarps;
constexpr int kFastDim = 128, kMostDim = 256;
constexpr float kLog2E = 1.44269504f;

__device__ inline float nothing() {
  return __int_as_float(static_cast<int>(0xFF800000u));  // -infinity
}

// Where key and value of a token lie; T is the cache's type.
template <typename T>
struct Token {
  const char* block;
  int slot;

  __device__ Token(const AttentionDecode& p, const int* table, int token) {
    slot = token % p.block_tokens;
    block = p.base + static_cast<uint64>(__ldcg(table + token / p.block_tokens)) * p.block_bytes;
  }
  // which: 0 for the key, 1 for the value.
  __device__ const T* vector(const AttentionDecode& p, int which, int head) const {
    return reinterpret_cast<const T*>(block) +
           (static_cast<int64>(which * p.heads + head) * p.block_tokens + slot) * p.head_dim;
  }
  __device__ float scale(const AttentionDecode& p, int which, int head) const {
    if (sizeof(T) != 1) return 1;
    const char* scales = block + 2 * static_cast<int64>(p.heads) * p.block_tokens * p.head_dim;
    return __ldcg(reinterpret_cast<const float*>(scales) + (which * p.heads + head) * p.block_tokens + slot);
  }
};

// What a block works on.
struct Chunk {
  int row, head, index, keys;  // keys of the sequence
  const int* table;

  __device__ explicit Chunk(const AttentionDecode& p)
      : row(blockIdx.z),
        head(blockIdx.y),
        index(blockIdx.x),
        keys(__ldcg(p.positions + row) + 1),
        table(p.blocks + static_cast<int64>(__ldcg(p.tables + row)) * p.max_blocks) {}
};

// Put the warps together and write the chunk's part; sums: [kWarps][head_dim] of shared memory, written by
// all, most and total of this warp.
__device__ void write_part(const AttentionDecode& p, const Chunk& chunk, const float* sums, float most,
                           float total) {
  __shared__ float mosts[kWarps], totals[kWarps];
  if (threadIdx.x % 32 == 0) {
    mosts[threadIdx.x / 32] = most;
    totals[threadIdx.x / 32] = total;
  }
  __syncthreads();
  float all = mosts[0];
  for (int warp = 1; warp < kWarps; ++warp) all = fmaxf(all, mosts[warp]);
  float scales[kWarps], sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    scales[warp] = exp2f(mosts[warp] - all);
    sum += totals[warp] * scales[warp];
  }
  const int64 part = (static_cast<int64>(chunk.row) * p.heads + chunk.head) * p.chunks + chunk.index;
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
    float value = 0;
    for (int warp = 0; warp < kWarps; ++warp) value += sums[warp * p.head_dim + d] * scales[warp];
    p.sums[part * p.head_dim + d] = value;
  }
  if (threadIdx.x == 0) {
    p.parts[2 * part] = all;
    p.parts[2 * part + 1] = sum;
  }
}

// The values in a lane's 16 bytes.
template <typename T>
__device__ void widen(const uint4& bytes, float (&values)[16 / sizeof(T)]) {
  const T* stored = reinterpret_cast<const T*>(&bytes);
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) values[i] = value_of(stored[i]);
}

template <typename T>
__device__ void attention(const AttentionDecode& p) {
  constexpr int kValues = 16 / sizeof(T);     // of a lane
  constexpr int kLanes = kFastDim / kValues;  // of a key
  constexpr int kTogether = 32 / kLanes;      // keys of a load
  constexpr int kLoads = kWarpKeys / kTogether;
  extern __shared__ uint4 shared[];
  start_successors();
  wait_for_predecessors();
  const Chunk chunk(p);
  if (chunk.index * kChunk >= chunk.keys) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, which = lane / kLanes;
  uint4* const keys = shared + warp * (2 * kLoads * 32) + lane;
  uint4* const values = keys + kLoads * 32;

  // A lane finds a key; all get to know where it is.
  const int first = chunk.index * kChunk + warp * kWarpKeys;
  const int here = chunk.keys - first;  // keys of this warp, or more, or none
  const Token<T> token(p, chunk.table, min(first + lane, chunk.keys - 1));
  const int64 to_value = static_cast<int64>(p.heads) * p.block_tokens * (kFastDim * sizeof(T));
  const int64 mine = reinterpret_cast<int64>(token.vector(p, 0, chunk.head));
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int key = j * kTogether + which;
      const char* from = reinterpret_cast<const char*>(__shfl_sync(0xFFFFFFFFu, mine, key)) + half * to_value;
      copy_ahead16((half ? values : keys) + 32 * j, from + lane % kLanes * 16, key < here);
    }
    commit_copies();
  }
  const float key_scale = token.scale(p, 0, chunk.head), value_scale = token.scale(p, 1, chunk.head);

  float q[kValues];
  {
    const H* from = static_cast<const H*>(p.q) +
                    (static_cast<int64>(chunk.row) * p.heads + chunk.head) * kFastDim +
                    lane % kLanes * kValues;
#pragma unroll
    for (int i = 0; i < kValues; i += 8) {
      const uint4 bytes = __ldcg(reinterpret_cast<const uint4*>(from + i));
      const H* stored = reinterpret_cast<const H*>(&bytes);
#pragma unroll
      for (int j = 0; j < 8; ++j) q[i + j] = to_float(stored[j]) * kLog2E;
    }
  }

  wait_for_copies<1>();
  float scores[kLoads], most = nothing();
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    float key[kValues], sum = 0;
    widen<T>(keys[32 * j], key);
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum += q[i] * key[i];
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
    if (sizeof(T) == 1) sum *= __shfl_sync(0xFFFFFFFFu, key_scale, j * kTogether + which);
    scores[j] = j * kTogether + which < here ? sum : nothing();
    most = fmaxf(most, scores[j]);
  }
  most = warp_max(most);
  const float base = here > 0 ? most : 0;
  float total = 0, sums[kValues] = {};
  wait_for_copies<0>();
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    float weight = exp2f(scores[j] - base);
    total += weight;
    if (sizeof(T) == 1) weight *= __shfl_sync(0xFFFFFFFFu, value_scale, j * kTogether + which);
    float value[kValues];
    widen<T>(values[32 * j], value);
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i] += weight * value[i];
  }
#pragma unroll
  for (int other = kLanes; other < 32; other *= 2) {
    total += __shfl_xor_sync(0xFFFFFFFFu, total, other);
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], other);
  }
  float* const all = reinterpret_cast<float*>(shared);
  __syncthreads();  // the copies have been read
  if (which == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) all[warp * kFastDim + lane * kValues + i] = sums[i];
  }
  write_part(p, chunk, all, most, total);
}

template <typename T>
__device__ void attention_any(const AttentionDecode& p) {
  constexpr int kMost = kMostDim / 32;
  __shared__ float all[kWarps * kMostDim];
  start_successors();
  wait_for_predecessors();
  const Chunk chunk(p);
  if (chunk.index * kChunk >= chunk.keys) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = chunk.index * kChunk + warp * kWarpKeys;
  const int here = min(kWarpKeys, chunk.keys - first);
  const H* q =
      static_cast<const H*>(p.q) + (static_cast<int64>(chunk.row) * p.heads + chunk.head) * p.head_dim;

  float score = nothing();  // of key `lane`
  for (int key = 0; key < here; ++key) {
    const Token<T> token(p, chunk.table, first + key);
    const T* vector = token.vector(p, 0, chunk.head);
    float sum = 0;
    for (int d = lane; d < p.head_dim; d += 32) sum += to_float(q[d]) * kLog2E * value_of(vector[d]);
    sum = warp_sum(sum) * token.scale(p, 0, chunk.head);
    if (lane == key) score = sum;
  }
  const float most = warp_max(score);
  const float weight = here > 0 ? exp2f(score - most) : 0;
  float sums[kMost] = {};
  for (int key = 0; key < here; ++key) {
    const Token<T> token(p, chunk.table, first + key);
    const T* vector = token.vector(p, 1, chunk.head);
    const float scaled = __shfl_sync(0xFFFFFFFFu, weight, key) * token.scale(p, 1, chunk.head);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int d = lane + 32 * i;
      if (d < p.head_dim) sums[i] += scaled * value_of(vector[d]);
    }
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int d = lane + 32 * i;
    if (d < p.head_dim) all[warp * p.head_dim + d] = sums[i];
  }
  write_part(p, chunk, all, most, warp_sum(weight));
}

}  // namespace

#define QVL_ATTENTION_DECODE(name, body, type)                                    \
  extern "C" __global__ __launch_bounds__(kThreads) void attention_decode_##name( \
      const __grid_constant__ AttentionDecode p) {                                \
    body<type>(p);                                                                \
  }
QVL_ATTENTION_DECODE(bfloat16, attention, BFloat16Value)
QVL_ATTENTION_DECODE(float16, attention, Float16Value)
QVL_ATTENTION_DECODE(int8, attention, int8)
QVL_ATTENTION_DECODE(any_bfloat16, attention_any, BFloat16Value)
QVL_ATTENTION_DECODE(any_float16, attention_any, Float16Value)
QVL_ATTENTION_DECODE(any_float32, attention_any, float)
QVL_ATTENTION_DECODE(any_int8, attention_any, int8)
#undef QVL_ATTENTION_DECODE

// Put the chunks of a head and a sequence together: a block each, a thread a value.
extern "C" __global__ __launch_bounds__(kMostDim) void attention_decode_combine(
    const __grid_constant__ AttentionDecode p) {
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.y, head = blockIdx.x, d = threadIdx.x;
  const int chunks = __ldcg(p.positions + row) / kChunk + 1;
  const int64 first = (static_cast<int64>(row) * p.heads + head) * p.chunks;
  const float2* parts = reinterpret_cast<const float2*>(p.parts) + first;
  if (d >= p.head_dim) return;
  float most = nothing();
  for (int i = 0; i < chunks; ++i) most = fmaxf(most, __ldcg(parts + i).x);
  float total = 0, sum = 0;
#pragma unroll 4
  for (int i = 0; i < chunks; ++i) {
    const float2 part = __ldcg(parts + i);
    const float scale = exp2f(part.x - most);
    total += part.y * scale;
    sum += __ldcg(p.sums + (first + i) * p.head_dim + d) * scale;
  }
  static_cast<H*>(p.y)[(static_cast<int64>(row) * p.heads + head) * p.head_dim + d] = to_half(sum / total);
}

}  // namespace qvl::cuda
