// Attention of decode steps: one query over the keys of its sequence, in the blocks of the paged cache.
//
// Layout. A block processes a chunk of 128 keys of one head and one row, a warp 32 of them. The warp requests
// the copies of all its keys and values to shared memory together, each lane into a separate slot, as in
// linear_decode.cu; three blocks per multiprocessor (int8: four). A lane has 16 bytes of a key: 16 lanes
// share a 16-bit key, 8 lanes an 8-bit key:
//
//   sequence   | chunk 0: keys 0-127 | chunk 1: 128-255 | .. |       grid [heads][chunks][rows]
//                block                 block
//   chunk      | warp 0: 32 | warp 1: 32 | warp 2: 32 | warp 3: 32 |
//   shared       [warp][keys | values][32 x 128 values]
//   scratch      parts [row][head][chunk] (maximum, sum) | sums [row][head][chunk][head_dim]
//
// Partial results (maximum, sum of exp2, weighted sum of values) of warps, then of chunks, are merged in a
// fixed order. Chunks begin at multiples of 128 tokens, so that a row depends only on its keys. Adjacent
// blocks have adjacent heads, whose keys are contiguous.
//
// On sm_90a the copy engine loads a warp's keys in one copy, and its values in another, if they are
// contiguous in the cache: on an H200 7 % less time than copies of 16 bytes at 32 x 2000 keys, 12 % at 64 x
// 300. The L2 evict-first policy took 3 % more and 3 % less, respectively.
//
// With few chunks, launch and memory latency dominate: each block requests older keys before the preceding
// product ends, and rotates the query; the block with the newest key rotates and stores that key; and the
// last block of a head and a row merges its chunks. With many chunks separate kernels do so
// (rotate_and_store, attention_decode_combine).
//
// attention_decode_any supports every head_dim up to 256, value by value.
//
// Cost. Bytes: each key and value once, 512 per head and token in bfloat16 at head_dim 128; time = 4 head_dim
// heads tokens bytes / bandwidth. 300 tokens of one sequence with 32 heads are 4.9 MB, 1.1 us on an H200,
// 2000 tokens of 32 sequences 1.05 GB, 245 us. One multiplication per value of 2 bytes, 0.5 per byte: no
// tensor cores are needed. Bound by the duration of a block, since its 64 KB of shared memory are in flight
// for only a part of it: dependent memory accesses to positions, blocks and keys, then the arithmetic.
//
// Reference: float64 in PyTorch, tests/cuda/test_decode.py::test_attention_is_that_of_float64; the fused step
// has the same bits as separate rotation and attention: test_a_step_is_rotation_and_attention.
#include "cuda/kernels/attention_decode.h"
#include "cuda/kernels/hopper.cuh"
#include "cuda/kernels/rotate.cuh"
#include "cuda/kernels/streams.cuh"

namespace qvl::cuda {
namespace {

constexpr int kChunk = 128, kWarps = 4, kThreads = 32 * kWarps, kWarpKeys = kChunk / kWarps;
constexpr int kFastDim = 128, kMostDim = 256;
constexpr int kTogetherChunks = 8;  // loads in flight when chunks are merged
constexpr float kLog2E = 1.44269504f;

__device__ inline float minus_infinity() {
  return __int_as_float(static_cast<int>(0xFF800000u));  // -infinity
}

// Work of a block: a chunk of a head of a row.
struct Chunk {
  int row, head, index;
  int first;     // first token
  int position;  // position of the row, its last token
  const int* table;

  __device__ explicit Chunk(const AttentionDecode& p)
      : row(blockIdx.z),
        head(blockIdx.x),
        index(blockIdx.y),
        first(index * kChunk),
        position(__ldcg(p.positions + row)),
        table(p.blocks +
              static_cast<int64>(p.tables != nullptr ? __ldcg(p.tables + row) : row) * p.max_blocks) {}
  // Index of the cache block of a token.
  __device__ int number(const AttentionDecode& p, int token) const {
    return __ldcg(table + token / p.block_tokens);
  }
  __device__ int64 pair(const AttentionDecode& p) const { return static_cast<int64>(row) * p.heads + head; }
};

// Addresses of the key and value of a token; T is the cache's type.
template <typename T>
struct Place {
  char* block;
  int slot;

  __device__ Place(const AttentionDecode& p, int number, int token)
      : block(p.base + static_cast<uint64>(number) * p.block_bytes), slot(token % p.block_tokens) {}
  // which: 0 for the key, 1 for the value.
  __device__ T* vector(const AttentionDecode& p, int which, int head) const {
    return reinterpret_cast<T*>(block) +
           (static_cast<int64>(which * p.heads + head) * p.block_tokens + slot) * p.head_dim;
  }
  // For 8-bit types.
  __device__ float* scale(const AttentionDecode& p, int which, int head) const {
    char* scales = block + 2 * static_cast<int64>(p.heads) * p.block_tokens * p.head_dim;
    return reinterpret_cast<float*>(scales) + (which * p.heads + head) * p.block_tokens + slot;
  }
};

// Merge the warps' results and write the chunk's partial result. sums: [kWarps][head_dim] in shared memory,
// written by all warps; most, total: maximum and sum of this warp.
__device__ inline void write_part(const AttentionDecode& p, int head_dim, const Chunk& chunk,
                                  const float* sums, float most, float total) {
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
  const int64 part = chunk.pair(p) * p.chunks + chunk.index;
#pragma unroll 1
  for (int d = threadIdx.x; d < head_dim; d += kThreads) {
    float value = 0;
    for (int warp = 0; warp < kWarps; ++warp) value += sums[warp * head_dim + d] * scales[warp];
    p.sums[part * head_dim + d] = value;
  }
  if (threadIdx.x == 0) {
    p.parts[2 * part] = all;
    p.parts[2 * part + 1] = sum;
  }
}

// Merge the chunks of a head and a row.
__device__ inline void combine(const AttentionDecode& p, int64 pair, int chunks) {
  const int64 first = pair * p.chunks;
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    float most = minus_infinity(), total = 0, sum = 0;
    for (int chunk = 0; chunk < chunks; chunk += kTogetherChunks) {
      float2 parts[kTogetherChunks];
      float values[kTogetherChunks], higher = most;
#pragma unroll
      for (int i = 0; i < kTogetherChunks; ++i) {
        const bool there = chunk + i < chunks;
        const int64 part = first + chunk + i;
        parts[i] =
            there ? __ldcg(reinterpret_cast<const float2*>(p.parts) + part) : float2{minus_infinity(), 0};
        values[i] = there ? __ldcg(p.sums + part * p.head_dim + d) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kTogetherChunks; ++i) higher = fmaxf(higher, parts[i].x);
      const float before = exp2f(most - higher);
      total *= before;
      sum *= before;
#pragma unroll
      for (int i = 0; i < kTogetherChunks; ++i) {
        const float scale = exp2f(parts[i].x - higher);
        total += parts[i].y * scale;
        sum += values[i] * scale;
      }
      most = higher;
    }
    static_cast<H*>(p.y)[pair * p.head_dim + d] = to_half(sum / total);
  }
}

// Increment the counter, or reset it to zero if it is `most`; returns the old value. Release and acquire:
// earlier writes of this block are visible to blocks that count later.
__device__ inline unsigned count(unsigned* counter, unsigned most) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(most)
               : "memory");
  return before;
}

// The last block of a head and a row merges the chunks, unless another kernel does.
__device__ void end_chunk(const AttentionDecode& p, const Chunk& chunk) {
  if (p.counters == nullptr) return;
  __shared__ bool last;
  const unsigned others = chunk.position / kChunk;
  __syncthreads();
  if (threadIdx.x == 0) last = others == 0 || count(p.counters + chunk.pair(p), others) == others;
  __syncthreads();
  if (last) combine(p, chunk.pair(p), static_cast<int>(others) + 1);
}

// Distribution of a warp's keys over its lanes: 16 bytes each.
template <typename T>
struct Lanes {
  static constexpr int kValues = 16 / sizeof(T);     // per lane
  static constexpr int kLanes = kFastDim / kValues;  // per key
  static constexpr int kTogether = 32 / kLanes;      // keys per load
  static constexpr int kLoads = kWarpKeys / kTogether;

  __device__ static int first() { return threadIdx.x % kLanes * kValues; }  // index of the lane's first value

  __device__ static void widen(const uint4& bytes, float (&values)[kValues]) {
    const uint32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if constexpr (sizeof(T) == 1) {  // via 2^23 + 128 + value: two instructions, a conversion takes three
        const uint32 bits = __byte_perm(words[i / 4] ^ 0x80808080u, 0x4B000000u, 0x7550 + i % 4);
        values[i] = __uint_as_float(bits) - 8388736.f;
      } else {
        values[i] = value_of(T{static_cast<uint16>(words[i / 2] >> 16 * (i % 2))});
      }
    }
  }
};

// A lane's values of a head of H, as loaded.
template <typename T>
struct Loaded {
  static constexpr int kValues = Lanes<T>::kValues;
  uint4 bytes[kValues / 8];

  __device__ void load(const H* from) {
#pragma unroll
    for (int i = 0; i < kValues / 8; ++i) bytes[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ float operator[](int i) const {
    return to_float(reinterpret_cast<const H*>(&bytes[i / 8])[i % 8]);
  }
};

// Cosines and sines for a lane's values.
template <typename T>
struct Rotation {
  using L = Lanes<T>;
  float cosines[L::kValues], sines[L::kValues], query_scale;

  __device__ Rotation(const AttentionDecode& p, int position, int table) {
    constexpr int kHalf = kFastDim / 2;
    query_scale = p.query_scale[position];
    const int64 place = static_cast<int64>(table) * p.max_positions + position;
    const bool low = L::first() < kHalf;
#pragma unroll
    for (int i = 0; i < L::kValues; i += 4) {
      const int64 here = place * kHalf + L::first() % kHalf + i;
      const float4 c = *reinterpret_cast<const float4*>(p.cos + here);
      const float4 z = *reinterpret_cast<const float4*>(p.sin + here);
      cosines[i] = c.x, cosines[i + 1] = c.y, cosines[i + 2] = c.z, cosines[i + 3] = c.w;
      sines[i] = z.x, sines[i + 1] = z.y, sines[i + 2] = z.z, sines[i + 3] = z.w;
#pragma unroll
      for (int j = i; j < i + 4; ++j) sines[j] = low ? -sines[j] : sines[j];
    }
  }

  // others: the values half a head apart.
  __device__ void of(const Loaded<T>& own, const Loaded<T>& others, float (&values)[L::kValues]) const {
#pragma unroll
    for (int i = 0; i < L::kValues; ++i) values[i] = rotated(own[i], others[i], cosines[i], sines[i]);
  }
};

// Convert a value to the type of the cache.
__device__ inline BFloat16Value narrow(BFloat16Value, float value, const Int8Head*) {
  return bfloat16_of(value);
}
__device__ inline Float16Value narrow(Float16Value, float value, const Int8Head*) {
  return float16_of(value);
}
__device__ inline int8 narrow(int8, float value, const Int8Head* head) {
  return head->of(value);
}

template <typename T>
__device__ uint4 narrowed(const float (&values)[Lanes<T>::kValues], float& scale) {
  float most = 0;
  if constexpr (sizeof(T) == 1) {
#pragma unroll
    for (float value : values) most = fmaxf(most, fabsf(value));
#pragma unroll
    for (int other = Lanes<T>::kLanes / 2; other > 0; other /= 2)
      most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, other));
  }
  const Int8Head head(most);
  scale = head.scale;
  uint4 bytes;
#pragma unroll
  for (int i = 0; i < Lanes<T>::kValues; ++i) reinterpret_cast<T*>(&bytes)[i] = narrow(T{}, values[i], &head);
  return bytes;
}

// Bulk copies (sm_90a): a warp's contiguous keys, and their values, in one copy each.
struct BulkCopies {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static constexpr bool kAvailable = true;
  uint32 barriers;  // for keys and for values, 8 bytes each

  __device__ BulkCopies() {
    __shared__ uint64 all[kWarps][2];
    barriers = shared_address(all[threadIdx.x / 32]);
    if (threadIdx.x % 32 == 0) {
      for (int half = 0; half < 2; ++half) barrier_init(barriers + 8 * half, 1);
      publish_barriers();
    }
    __syncwarp();
  }
  // Called by one lane, once per half.
  __device__ void request(int half, void* to, const void* from, int bytes) const {
    barrier_expect(barriers + 8 * half, bytes);
    copy_bytes(shared_address(to), from, bytes, barriers + 8 * half);
  }
  __device__ void wait(int half) const { barrier_wait(barriers + 8 * half, 0); }
#else
  static constexpr bool kAvailable = false;
  __device__ void request(int, void*, const void*, int) const {}
  __device__ void wait(int) const {}
#endif
};

template <typename T>
__device__ void attention(const AttentionDecode& p) {
  using L = Lanes<T>;
  constexpr int kValues = L::kValues, kLanes = L::kLanes, kTogether = L::kTogether, kLoads = L::kLoads;
  constexpr bool kScaled = sizeof(T) == 1;
  extern __shared__ uint4 shared[];
  start_successors();
  const BulkCopies copies;
  const bool rotate = p.qkv != nullptr;
  if (!p.early) wait_for_predecessors();
  const Chunk chunk(p);
  const int angle_table = rotate ? __ldcg(p.angle_tables + chunk.row) : 0;
  // The shuffle tells the compiler that the warp number is uniform.
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32, which = lane / kLanes;
  // Each lane looks up the block of one key, before knowing whether the row has that key.
  const int first = chunk.first + warp * kWarpKeys, token = first + lane;
  // The shuffle with the lane itself prevents the compiler from delaying the load until its use.
  const int number =
      __shfl_sync(0xFFFFFFFFu, chunk.number(p, min(token, p.max_blocks * p.block_tokens - 1)), lane);
  if (chunk.first > chunk.position) return;
  // Number of keys from this warp's first key on: may be 0, or more than its 32.
  const int here = chunk.position + 1 - first;
  const int newest = here - 1;
  const bool has_newest = newest >= 0 && newest < kWarpKeys;
  const Place<T> place(p, lane < here ? number : 0, token);
  const int64 mine = reinterpret_cast<int64>(place.vector(p, 0, chunk.head));
  const int64 to_value = static_cast<int64>(p.heads) * p.block_tokens * (kFastDim * sizeof(T));
  uint4* const keys = shared + warp * (2 * kLoads * 32) + lane;
  uint4* const values = keys + kLoads * 32;
  if (has_newest && !rotate) wait_for_predecessors();  // the kernel that stored the newest key
  const int stored = rotate ? newest : here;
  // Whether to use bulk copies: not for a warp with the newest key, which this kernel or the preceding one
  // writes.
  const bool whole = BulkCopies::kAvailable && newest >= kWarpKeys && p.block_tokens % kWarpKeys == 0;
  for (int half = 0; half < 2; ++half) {
    if (whole) {
      if (lane == 0)
        copies.request(half, half ? values : keys, reinterpret_cast<const char*>(mine) + half * to_value,
                       kWarpKeys * kFastDim * sizeof(T));
      continue;
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int key = j * kTogether + which;
      const char* from = reinterpret_cast<const char*>(__shfl_sync(0xFFFFFFFFu, mine, key)) + half * to_value;
      if (!rotate || key != newest)
        copy_ahead16((half ? values : keys) + 32 * j, from + lane % kLanes * 16, key < stored);
    }
    commit_copies();
  }
  float key_scale = 0, value_scale = 0;  // 0 for a missing key
  if (kScaled && lane < here) {
    key_scale = __ldcg(place.scale(p, 0, chunk.head));
    value_scale = __ldcg(place.scale(p, 1, chunk.head));
  }

  float q[kValues];
  Loaded<T> own;
  if (rotate) {
    const Rotation<T> rotation(p, chunk.position, angle_table);
    wait_for_predecessors();
    // Only one warp needs the new key and value, but loading them in all warps is free.
    const int width = p.heads * kFastDim, over = L::first() < kFastDim / 2 ? kFastDim / 2 : -kFastDim / 2;
    const H* from = static_cast<const H*>(p.qkv) + 3 * static_cast<int64>(width) * chunk.row +
                    chunk.head * kFastDim + L::first();
    Loaded<T> others, key, other_keys, value;
    own.load(from);
    others.load(from + over);
    key.load(from + width);
    other_keys.load(from + width + over);
    value.load(from + 2 * width);
    rotation.of(own, others, q);
#pragma unroll
    for (float& each : q) each = to_float(to_half(each * rotation.query_scale));
    float vector[kValues], new_scales[2];
    uint4 bytes[2];
    rotation.of(key, other_keys, vector);
    bytes[0] = narrowed<T>(vector, new_scales[0]);
#pragma unroll
    for (int i = 0; i < kValues; ++i) vector[i] = value[i];
    bytes[1] = narrowed<T>(vector, new_scales[1]);
    if (has_newest) {
      char* const to = reinterpret_cast<char*>(__shfl_sync(0xFFFFFFFFu, mine, newest)) + lane % kLanes * 16;
      if (which == newest % kTogether) {
        keys[newest / kTogether * 32] = bytes[0];
        values[newest / kTogether * 32] = bytes[1];
        *reinterpret_cast<uint4*>(to) = bytes[0];
        *reinterpret_cast<uint4*>(to + to_value) = bytes[1];
      }
      if (kScaled && lane == newest) {
        *place.scale(p, 0, chunk.head) = key_scale = new_scales[0];
        *place.scale(p, 1, chunk.head) = value_scale = new_scales[1];
      }
    }
  } else {
    wait_for_predecessors();
    own.load(static_cast<const H*>(p.q) + chunk.pair(p) * kFastDim + L::first());
#pragma unroll
    for (int i = 0; i < kValues; ++i) q[i] = own[i];
  }
#pragma unroll
  for (float& value : q) value *= kLog2E;

  wait_for_copies<1>();
  if (whole) copies.wait(0);
  float scores[kLoads], most = minus_infinity();
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    float key[kValues], sum = 0;
    L::widen(keys[32 * j], key);
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum += q[i] * key[i];
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
    if (kScaled) sum *= __shfl_sync(0xFFFFFFFFu, key_scale, j * kTogether + which);
    scores[j] = j * kTogether + which < here ? sum : minus_infinity();
    most = fmaxf(most, scores[j]);
  }
  most = warp_max(most);
  const float base = here > 0 ? most : 0;
  float total = 0, sums[kValues] = {};
  wait_for_copies<0>();
  if (whole) copies.wait(1);
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    float weight = exp2f(scores[j] - base);
    total += weight;
    if (kScaled) weight *= __shfl_sync(0xFFFFFFFFu, value_scale, j * kTogether + which);
    float value[kValues];
    L::widen(values[32 * j], value);
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
  __syncthreads();  // all warps have read their copies
  if (which == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) all[warp * kFastDim + lane * kValues + i] = sums[i];
  }
  write_part(p, kFastDim, chunk, all, most, total);
  end_chunk(p, chunk);
}

template <typename T>
__device__ void attention_any(const AttentionDecode& p) {
  constexpr int kMost = kMostDim / 32;
  __shared__ float all[kWarps * kMostDim];
  start_successors();
  wait_for_predecessors();
  const Chunk chunk(p);
  if (chunk.first > chunk.position) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = chunk.first + warp * kWarpKeys;
  const int here = min(kWarpKeys, chunk.position + 1 - first);
  const H* q = static_cast<const H*>(p.q) + chunk.pair(p) * p.head_dim;
  const auto place_of = [&](int key) { return Place<T>(p, chunk.number(p, first + key), first + key); };
  const auto scale_of = [&](const Place<T>& place, int part) {
    return sizeof(T) == 1 ? __ldcg(place.scale(p, part, chunk.head)) : 1.f;
  };

  float score = minus_infinity();  // of key `lane`
  for (int key = 0; key < here; ++key) {
    const Place<T> place = place_of(key);
    const T* vector = place.vector(p, 0, chunk.head);
    float sum = 0;
    for (int d = lane; d < p.head_dim; d += 32) sum += to_float(q[d]) * kLog2E * value_of(vector[d]);
    sum = warp_sum(sum) * scale_of(place, 0);
    if (lane == key) score = sum;
  }
  const float most = warp_max(score);
  const float weight = here > 0 ? exp2f(score - most) : 0;
  float sums[kMost] = {};
  for (int key = 0; key < here; ++key) {
    const Place<T> place = place_of(key);
    const T* vector = place.vector(p, 1, chunk.head);
    const float scaled = __shfl_sync(0xFFFFFFFFu, weight, key) * scale_of(place, 1);
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
  write_part(p, p.head_dim, chunk, all, most, warp_sum(weight));
  end_chunk(p, chunk);
}

}  // namespace

#define QVL_ATTENTION_DECODE(name, body, type, blocks)                                            \
  extern "C" __global__ __launch_bounds__(                                                        \
      kThreads, blocks) void attention_decode_##name(const __grid_constant__ AttentionDecode p) { \
    body<type>(p);                                                                                \
  }
QVL_ATTENTION_DECODE(bfloat16, attention, BFloat16Value, 3)
QVL_ATTENTION_DECODE(float16, attention, Float16Value, 3)
QVL_ATTENTION_DECODE(int8, attention, int8, 4)
QVL_ATTENTION_DECODE(any_bfloat16, attention_any, BFloat16Value, 1)
QVL_ATTENTION_DECODE(any_float16, attention_any, Float16Value, 1)
QVL_ATTENTION_DECODE(any_float32, attention_any, float, 1)
QVL_ATTENTION_DECODE(any_int8, attention_any, int8, 1)
#undef QVL_ATTENTION_DECODE

extern "C" __global__ __launch_bounds__(kMostDim) void attention_decode_combine(
    const __grid_constant__ AttentionDecode p) {
  start_successors();
  const int row = blockIdx.y, pair = row * p.heads + static_cast<int>(blockIdx.x);
  if (!p.early) wait_for_predecessors();
  const int chunks = __ldcg(p.positions + row) / kChunk + 1;
  wait_for_predecessors();
  combine(p, pair, chunks);
}

}  // namespace qvl::cuda
