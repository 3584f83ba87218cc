// Attention of decode steps: one query over the keys of its sequence, in the blocks of the paged cache.
//
// Layout. A block of threads processes a chunk of 128 keys of one head and one row, a warp 32 of them. The
// warp requests the copies of all its keys and values to shared memory at once; unless the copy engine loads
// them (see below), each lane copies the bytes that it reads. Three blocks fit a multiprocessor of an H200
// (int8: four). A lane processes 16 bytes of a key: 16 lanes share a key of 16-bit values, 8 lanes a key of
// 8-bit values:
//
//   sequence   | chunk 0: keys 0-127 | chunk 1: 128-255 | .. |       grid [heads][chunks][rows]
//                block                 block
//   chunk      | warp 0: 32 | warp 1: 32 | warp 2: 32 | warp 3: 32 |
//   shared       [warp][keys | values][32 x 128 values]
//   scratch      counters | parts [row][head][chunk] (maximum, sum) | sums [row][head][chunk][head_dim]
//
// Partial results (maximum, sum of exp2, weighted sum of values) of warps, then of chunks, are merged in a
// fixed order. Chunks begin at multiples of 128 tokens, so that a row's result depends only on its query,
// keys and values. Adjacent blocks of threads have adjacent heads, whose keys are contiguous in a block of
// the cache.
//
// On sm_90a the copy engine loads a warp's keys in one copy, and its values in another, if all are older than
// the newest key and contiguous in the cache. On an H200 this took 7 % less time than copies of 16 bytes at
// 32 rows x 2000 keys, and 12 % less at 64 x 300. The L2 evict-first policy is not used: it took 3 % more
// time in the first case and 3 % less in the second.
//
// With few chunks (is_small in attention_decode.cc), launch and memory latency dominate: the last block of a
// head and a row to finish merges the chunks. In attention_step (ops.h), moreover, each block rotates the
// query, and the block with the newest key rotates this key and stores it and its value. With many chunks
// separate kernels rotate, store and merge (rotate_and_store, attention_decode_combine). With few and with
// many, attention_step lets each block request older keys before the preceding kernel ends (`early`).
//
// The kernels attention_decode_any_*, for the cases that is_fast in attention_decode.cc excludes, support
// every even head_dim up to 256 and every cache type, value by value. They neither rotate nor store, and read
// nothing before the preceding kernels have ended.
//
// Cost. Bytes: each key and value once, 512 per head and token in bfloat16 at head_dim 128; 4 * head_dim *
// heads * tokens in total; time at least bytes / bandwidth. 300 tokens of one sequence with 32 heads are 4.9
// MB, 1.1 us on an H200, 2000 tokens of 32 sequences 1.05 GB, 245 us. One multiplication per value of 2
// bytes, 0.5 per byte: no tensor cores are needed. Bound by the duration of a block, a sequence of dependent
// memory accesses (positions, blocks, keys) and arithmetic: the copies to its 64 KB of shared memory (int8:
// 32 KB) are in flight for only a part of that time.
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
constexpr int kFastDim = 128, kMaxDim = 256;
constexpr int kMergedChunks = 8;  // chunks whose loads are in flight together when chunks are merged
constexpr float kLog2E = 1.44269504f;

__device__ inline float minus_infinity() {
  return __int_as_float(static_cast<int>(0xFF800000u));
}

// Work of a block: a chunk of the keys of a row, for one head.
struct Chunk {
  int row, head, index;
  int first;         // position of the chunk's first key
  int position;      // position of the row's token, the newest key
  const int* table;  // block table of the row's sequence

  __device__ explicit Chunk(const AttentionDecode& p)
      : row(blockIdx.z),
        head(blockIdx.x),
        index(blockIdx.y),
        first(index * kChunk),
        position(__ldcg(p.positions + row)),
        table(p.blocks +
              static_cast<int64>(p.tables != nullptr ? __ldcg(p.tables + row) : row) * p.max_blocks) {}
  // Index of the cache block of a token.
  __device__ int block_index(const AttentionDecode& p, int token) const {
    return __ldcg(table + token / p.block_tokens);
  }
  // Index of the row and the head in [n][heads].
  __device__ int64 pair(const AttentionDecode& p) const { return static_cast<int64>(row) * p.heads + head; }
};

// Addresses of the key and value of a token; T is the cache's type.
template <typename T>
struct TokenAddress {
  char* block;
  int slot;

  __device__ TokenAddress(const AttentionDecode& p, int block_index, int token)
      : block(p.base + static_cast<uint64>(block_index) * p.block_bytes), slot(token % p.block_tokens) {}
  // part: 0: the key; 1: the value.
  __device__ T* vector(const AttentionDecode& p, int part, int head) const {
    return reinterpret_cast<T*>(block) +
           (static_cast<int64>(part * p.heads + head) * p.block_tokens + slot) * p.head_dim;
  }
  // Address of the scale of the key or the value, for 8-bit types.
  __device__ float* scale(const AttentionDecode& p, int part, int head) const {
    char* scales = block + 2 * static_cast<int64>(p.heads) * p.block_tokens * p.head_dim;
    return reinterpret_cast<float*>(scales) + (part * p.heads + head) * p.block_tokens + slot;
  }
};

// Merge the results of the warps and write the partial result of the chunk. sums: [kWarps][head_dim] in
// shared memory, written by all warps; maximum, total: maximum of the scores and sum of the weights of this
// warp.
__device__ inline void write_part(const AttentionDecode& p, int head_dim, const Chunk& chunk,
                                  const float* sums, float maximum, float total) {
  __shared__ float maxima[kWarps], totals[kWarps];
  if (threadIdx.x % 32 == 0) {
    maxima[threadIdx.x / 32] = maximum;
    totals[threadIdx.x / 32] = total;
  }
  __syncthreads();
  float chunk_maximum = maxima[0];
  for (int warp = 1; warp < kWarps; ++warp) chunk_maximum = fmaxf(chunk_maximum, maxima[warp]);
  float scales[kWarps], sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    scales[warp] = exp2f(maxima[warp] - chunk_maximum);
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
    p.parts[2 * part] = chunk_maximum;
    p.parts[2 * part + 1] = sum;
  }
}

// Merge the chunks of a head and a row, and write y. pair: Chunk::pair().
__device__ inline void combine(const AttentionDecode& p, int64 pair, int chunks) {
  const int64 first = pair * p.chunks;
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    float maximum = minus_infinity(), total = 0, sum = 0;
    for (int chunk = 0; chunk < chunks; chunk += kMergedChunks) {
      float2 parts[kMergedChunks];
      float values[kMergedChunks], new_maximum = maximum;
#pragma unroll
      for (int i = 0; i < kMergedChunks; ++i) {
        const bool valid = chunk + i < chunks;
        const int64 part = first + chunk + i;
        parts[i] =
            valid ? __ldcg(reinterpret_cast<const float2*>(p.parts) + part) : float2{minus_infinity(), 0};
        values[i] = valid ? __ldcg(p.sums + part * p.head_dim + d) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kMergedChunks; ++i) new_maximum = fmaxf(new_maximum, parts[i].x);
      const float factor = exp2f(maximum - new_maximum);
      total *= factor;
      sum *= factor;
#pragma unroll
      for (int i = 0; i < kMergedChunks; ++i) {
        const float scale = exp2f(parts[i].x - new_maximum);
        total += parts[i].y * scale;
        sum += values[i] * scale;
      }
      maximum = new_maximum;
    }
    static_cast<H*>(p.y)[pair * p.head_dim + d] = to_half(sum / total);
  }
}

// Increment the counter, or reset it to zero if it is `maximum`; return the old value. Release and acquire:
// earlier writes of this block are visible to blocks that increment the counter later.
__device__ inline unsigned increment(unsigned* counter, unsigned maximum) {
  unsigned old_value;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old_value)
               : "l"(counter), "r"(maximum)
               : "memory");
  return old_value;
}

// End of a block: the last block of a head and a row to finish merges the chunks, unless another kernel
// merges them.
__device__ void end_chunk(const AttentionDecode& p, const Chunk& chunk) {
  if (p.counters == nullptr) return;
  __shared__ bool last;
  const unsigned n_others = chunk.position / kChunk;
  __syncthreads();
  if (threadIdx.x == 0) last = n_others == 0 || increment(p.counters + chunk.pair(p), n_others) == n_others;
  __syncthreads();
  if (last) combine(p, chunk.pair(p), static_cast<int>(n_others) + 1);
}

// Distribution of a warp's keys over its lanes: 16 bytes each.
template <typename T>
struct Lanes {
  static constexpr int kValues = 16 / sizeof(T);     // per lane
  static constexpr int kLanes = kFastDim / kValues;  // per key
  static constexpr int kKeysPerLoad = 32 / kLanes;   // of a warp
  static constexpr int kLoads = kWarpKeys / kKeysPerLoad;

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

// A lane's values of a head, in H, as loaded.
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

// Cosines and sines for a lane's values; the sines are negated in the lower half of a head, as for rotated().
template <typename T>
struct Rotation {
  using L = Lanes<T>;
  float cosines[L::kValues], sines[L::kValues], query_scale;

  __device__ Rotation(const AttentionDecode& p, int position, int table) {
    constexpr int kHalf = kFastDim / 2;
    query_scale = p.query_scale[position];
    const int64 table_row = static_cast<int64>(table) * p.max_positions + position;
    const bool low = L::first() < kHalf;
#pragma unroll
    for (int i = 0; i < L::kValues; i += 4) {
      const int64 index = table_row * kHalf + L::first() % kHalf + i;
      const float4 c = *reinterpret_cast<const float4*>(p.cos + index);
      const float4 s = *reinterpret_cast<const float4*>(p.sin + index);
      cosines[i] = c.x, cosines[i + 1] = c.y, cosines[i + 2] = c.z, cosines[i + 3] = c.w;
      sines[i] = s.x, sines[i + 1] = s.y, sines[i + 2] = s.z, sines[i + 3] = s.w;
#pragma unroll
      for (int j = i; j < i + 4; ++j) sines[j] = low ? -sines[j] : sines[j];
    }
  }

  // Rotate values: `pairs` contains for each value of `raw` the value half a head apart.
  __device__ void of(const Loaded<T>& raw, const Loaded<T>& pairs, float (&values)[L::kValues]) const {
#pragma unroll
    for (int i = 0; i < L::kValues; ++i) values[i] = rotated(raw[i], pairs[i], cosines[i], sines[i]);
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
  return head->quantize(value);
}

// Convert a lane's values to the type of the cache. scale: set to the scale of the head, for int8.
template <typename T>
__device__ uint4 narrowed(const float (&values)[Lanes<T>::kValues], float& scale) {
  float maximum = 0;
  if constexpr (sizeof(T) == 1) {
#pragma unroll
    for (float value : values) maximum = fmaxf(maximum, fabsf(value));
#pragma unroll
    for (int distance = Lanes<T>::kLanes / 2; distance > 0; distance /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, distance));
  }
  const Int8Head head(maximum);
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
    __shared__ uint64 storage[kWarps][2];
    barriers = shared_address(storage[threadIdx.x / 32]);
    if (threadIdx.x % 32 == 0) {
      for (int part = 0; part < 2; ++part) barrier_init(barriers + 8 * part, 1);
      publish_barriers();
    }
    __syncwarp();
  }
  // part: 0: keys; 1: values. Called by one lane, once per part.
  __device__ void request(int part, void* to, const void* from, int bytes) const {
    barrier_expect(barriers + 8 * part, bytes);
    copy_bytes(shared_address(to), from, bytes, barriers + 8 * part);
  }
  __device__ void wait(int part) const { barrier_wait(barriers + 8 * part, 0); }
#else
  static constexpr bool kAvailable = false;
  __device__ void request(int, void*, const void*, int) const {}
  __device__ void wait(int) const {}
#endif
};

// Attention for head_dim 128 and caches of 16 or 8 bits.
template <typename T>
__device__ void attention(const AttentionDecode& p) {
  using L = Lanes<T>;
  constexpr int kValues = L::kValues, kLanes = L::kLanes, kKeysPerLoad = L::kKeysPerLoad, kLoads = L::kLoads;
  constexpr bool kScaled = sizeof(T) == 1;
  extern __shared__ uint4 shared[];
  start_successors();
  const BulkCopies copies;
  const bool rotate = p.qkv != nullptr;
  if (!p.early) wait_for_predecessors();
  const Chunk chunk(p);
  const int angle_table = rotate ? __ldcg(p.angle_tables + chunk.row) : 0;
  // The shuffle tells the compiler that the warp number is the same in all lanes.
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32, key_in_load = lane / kLanes;
  // Each lane looks up the cache block of one key, before it knows whether the row has this key: waiting for
  // the position first would add a memory latency.
  const int first = chunk.first + warp * kWarpKeys, token = first + lane;
  // The shuffle with the lane itself prevents the compiler from delaying the load until its use.
  const int block_index =
      __shfl_sync(0xFFFFFFFFu, chunk.block_index(p, min(token, p.max_blocks * p.block_tokens - 1)), lane);
  if (chunk.first > chunk.position) return;
  // Number of the row's keys from this warp's first key on: may be 0 or negative, or exceed the warp's 32
  // keys.
  const int n_keys = chunk.position + 1 - first;
  const int newest = n_keys - 1;  // index of the newest key, counted from this warp's first key
  const bool has_newest = newest >= 0 && newest < kWarpKeys;
  const TokenAddress<T> address(p, lane < n_keys ? block_index : 0, token);
  const int64 key_address = reinterpret_cast<int64>(address.vector(p, 0, chunk.head));
  // Bytes from the key of a token to its value.
  const int64 to_value = static_cast<int64>(p.heads) * p.block_tokens * (kFastDim * sizeof(T));
  uint4* const keys = shared + warp * (2 * kLoads * 32) + lane;
  uint4* const values = keys + kLoads * 32;
  if (has_newest && !rotate) wait_for_predecessors();  // the kernel that stored the newest key
  const int n_to_copy = rotate ? newest : n_keys;
  // Whether to use bulk copies: only for 32 keys older than the newest one, which this kernel or the
  // preceding one writes, and only if the 32 keys are in one block of the cache, and thus contiguous.
  const bool bulk = BulkCopies::kAvailable && newest >= kWarpKeys && p.block_tokens % kWarpKeys == 0;
  for (int part = 0; part < 2; ++part) {
    if (bulk) {
      if (lane == 0)
        copies.request(part, part ? values : keys,
                       reinterpret_cast<const char*>(key_address) + part * to_value,
                       kWarpKeys * kFastDim * sizeof(T));
      continue;
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int key = j * kKeysPerLoad + key_in_load;
      const char* from =
          reinterpret_cast<const char*>(__shfl_sync(0xFFFFFFFFu, key_address, key)) + part * to_value;
      if (!rotate || key != newest)
        copy_async16((part ? values : keys) + 32 * j, from + lane % kLanes * 16, key < n_to_copy);
    }
    commit_copies();
  }
  float key_scale = 0, value_scale = 0;  // 0 for a missing key
  if (kScaled && lane < n_keys) {
    key_scale = __ldcg(address.scale(p, 0, chunk.head));
    value_scale = __ldcg(address.scale(p, 1, chunk.head));
  }

  float q[kValues];
  Loaded<T> q_raw;
  if (rotate) {
    const Rotation<T> rotation(p, chunk.position, angle_table);
    wait_for_predecessors();
    // Only one warp needs the new key and value, but loading them in all warps takes no extra time.
    const int width = p.heads * kFastDim,
              pair_offset = L::first() < kFastDim / 2 ? kFastDim / 2 : -kFastDim / 2;
    const H* from = static_cast<const H*>(p.qkv) + 3 * static_cast<int64>(width) * chunk.row +
                    chunk.head * kFastDim + L::first();
    Loaded<T> q_pair, key, key_pair, value;
    q_raw.load(from);
    q_pair.load(from + pair_offset);
    key.load(from + width);
    key_pair.load(from + width + pair_offset);
    value.load(from + 2 * width);
    rotation.of(q_raw, q_pair, q);
#pragma unroll
    for (float& q_value : q) q_value = to_float(to_half(q_value * rotation.query_scale));
    float vector[kValues], new_scales[2];
    uint4 bytes[2];
    rotation.of(key, key_pair, vector);
    bytes[0] = narrowed<T>(vector, new_scales[0]);
#pragma unroll
    for (int i = 0; i < kValues; ++i) vector[i] = value[i];
    bytes[1] = narrowed<T>(vector, new_scales[1]);
    if (has_newest) {
      char* const to =
          reinterpret_cast<char*>(__shfl_sync(0xFFFFFFFFu, key_address, newest)) + lane % kLanes * 16;
      if (key_in_load == newest % kKeysPerLoad) {
        keys[newest / kKeysPerLoad * 32] = bytes[0];
        values[newest / kKeysPerLoad * 32] = bytes[1];
        *reinterpret_cast<uint4*>(to) = bytes[0];
        *reinterpret_cast<uint4*>(to + to_value) = bytes[1];
      }
      if (kScaled && lane == newest) {
        *address.scale(p, 0, chunk.head) = key_scale = new_scales[0];
        *address.scale(p, 1, chunk.head) = value_scale = new_scales[1];
      }
    }
  } else {
    wait_for_predecessors();
    q_raw.load(static_cast<const H*>(p.q) + chunk.pair(p) * kFastDim + L::first());
#pragma unroll
    for (int i = 0; i < kValues; ++i) q[i] = q_raw[i];
  }
#pragma unroll
  for (float& value : q) value *= kLog2E;

  wait_for_copies<1>();
  if (bulk) copies.wait(0);
  float scores[kLoads], maximum = minus_infinity();
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    float key[kValues], sum = 0;
    L::widen(keys[32 * j], key);
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum += q[i] * key[i];
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
    if (kScaled) sum *= __shfl_sync(0xFFFFFFFFu, key_scale, j * kKeysPerLoad + key_in_load);
    scores[j] = j * kKeysPerLoad + key_in_load < n_keys ? sum : minus_infinity();
    maximum = fmaxf(maximum, scores[j]);
  }
  maximum = warp_max(maximum);
  const float base = n_keys > 0 ? maximum : 0;  // -infinity - -infinity is NaN
  float total = 0, sums[kValues] = {};
  wait_for_copies<0>();
  if (bulk) copies.wait(1);
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    float weight = exp2f(scores[j] - base);
    total += weight;
    if (kScaled) weight *= __shfl_sync(0xFFFFFFFFu, value_scale, j * kKeysPerLoad + key_in_load);
    float value[kValues];
    L::widen(values[32 * j], value);
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i] += weight * value[i];
  }
#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2) {
    total += __shfl_xor_sync(0xFFFFFFFFu, total, distance);
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], distance);
  }
  float* const warp_sums = reinterpret_cast<float*>(shared);
  __syncthreads();  // all warps have read their copies
  if (key_in_load == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) warp_sums[warp * kFastDim + lane * kValues + i] = sums[i];
  }
  write_part(p, kFastDim, chunk, warp_sums, maximum, total);
  end_chunk(p, chunk);
}

// Attention for every head_dim up to kMaxDim and every type of the cache.
template <typename T>
__device__ void attention_any(const AttentionDecode& p) {
  constexpr int kLaneDims = kMaxDim / 32;
  __shared__ float warp_sums[kWarps * kMaxDim];
  start_successors();
  wait_for_predecessors();
  const Chunk chunk(p);
  if (chunk.first > chunk.position) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = chunk.first + warp * kWarpKeys;
  const int n_keys = min(kWarpKeys, chunk.position + 1 - first);
  const H* q = static_cast<const H*>(p.q) + chunk.pair(p) * p.head_dim;
  const auto address_of = [&](int key) {
    return TokenAddress<T>(p, chunk.block_index(p, first + key), first + key);
  };
  const auto scale_of = [&](const TokenAddress<T>& address, int part) {
    return sizeof(T) == 1 ? __ldcg(address.scale(p, part, chunk.head)) : 1.f;
  };

  float score = minus_infinity();  // of key `lane`
  for (int key = 0; key < n_keys; ++key) {
    const TokenAddress<T> address = address_of(key);
    const T* vector = address.vector(p, 0, chunk.head);
    float sum = 0;
    for (int d = lane; d < p.head_dim; d += 32) sum += to_float(q[d]) * kLog2E * value_of(vector[d]);
    sum = warp_sum(sum) * scale_of(address, 0);
    if (lane == key) score = sum;
  }
  const float maximum = warp_max(score);
  const float weight = n_keys > 0 ? exp2f(score - maximum) : 0;
  float sums[kLaneDims] = {};
  for (int key = 0; key < n_keys; ++key) {
    const TokenAddress<T> address = address_of(key);
    const T* vector = address.vector(p, 1, chunk.head);
    const float scaled = __shfl_sync(0xFFFFFFFFu, weight, key) * scale_of(address, 1);
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      const int d = lane + 32 * i;
      if (d < p.head_dim) sums[i] += scaled * value_of(vector[d]);
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    const int d = lane + 32 * i;
    if (d < p.head_dim) warp_sums[warp * p.head_dim + d] = sums[i];
  }
  write_part(p, p.head_dim, chunk, warp_sums, maximum, warp_sum(weight));
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

extern "C" __global__ __launch_bounds__(kMaxDim) void attention_decode_combine(
    const __grid_constant__ AttentionDecode p) {
  start_successors();
  const int row = blockIdx.y, pair = row * p.heads + static_cast<int>(blockIdx.x);
  if (!p.early) wait_for_predecessors();
  const int chunks = __ldcg(p.positions + row) / kChunk + 1;
  wait_for_predecessors();
  combine(p, pair, chunks);
}

}  // namespace qvl::cuda
