// Causal attention of prompts over a paged cache: attention_prompt_hopper_* on Hopper with head_dim up to
// 128, otherwise attention_prompt_*, the kernels for any GPU.
//
// Layout. A block of threads has the queries of one tile of a prompt chunk (in the kernels for any GPU, of
// half a tile), for one head. The last tiles, in a prompt those with the most keys, start first. Keys and
// values of types other than H are converted to H when they are loaded:
//
//   prompt chunks    | first, n, past, table |     queries [first, first + n) of q, at positions past ..
//   tiles            | chunk, offset |             128 queries from `offset` on
//   KV blocks        | b0 | b1 | b2 |              key t: row t % block_tokens of b[t / block_tokens]
//   a KV block       [2][heads][block_tokens][head_dim], with int8 followed by float32 scales
//                    [2][heads][block_tokens]
//
// Tiles, buffers and cost: see attention.cuh, attention_hopper.cuh. In a prompt of n tokens about n^2 / 2
// pairs of query and key are not masked: 2 * head_dim * heads * n^2 operations.
//
// Reference: float64 in PyTorch, tests/cuda/test_prompt_attention.py::test_prompts; the same bits for any
// chunks of a prompt: test_a_prompt_cut_anywhere_is_the_same.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels/attention_hopper.cuh"

namespace qvl::cuda {

// Keys and values of a sequence in the paged cache, the Source of attend() and attend_hopper(). part: 0:
// keys; 1: values.
struct PagedKeys {
  const PagedAttention& p;
  const int* table;  // block table of the sequence
  int head, n;       // n: number of keys
  // In shared memory, for key i of a tile of keys: offsets[i * step] is the offset in bytes of the key in the
  // cache, -1 beyond the last key; for int8, offsets[first_scale + i * step] is that of the key's scale.
  int64* offsets;
  int step, first_scale;

  // Bytes per value, and bytes from the keys of a block to its values.
  __device__ int width() const { return p.type == kFloatKeys ? 4 : p.type == kInt8Keys ? 1 : 2; }
  __device__ int64 part_bytes() const {
    return static_cast<int64>(p.heads) * p.block_tokens * p.head_dim * width();
  }
  __device__ int64 key_offset(int key) const {
    const int block = key / p.block_tokens, row = head * p.block_tokens + key % p.block_tokens;
    return static_cast<int64>(table[block] * p.block_bytes) + static_cast<int64>(row) * p.head_dim * width();
  }
  __device__ int64 scale_offset(int key) const {
    const int block = key / p.block_tokens, row = head * p.block_tokens + key % p.block_tokens;
    return static_cast<int64>(table[block] * p.block_bytes) + 2 * part_bytes() + 4 * row;
  }
  __device__ float scale(int part, int64 offset) const {
    return *reinterpret_cast<const float*>(p.base + offset + part * p.heads * p.block_tokens * 4);
  }

  // Load from[d], of any type, as float32.
  __device__ float load_float(const char* from, int d) const {
    switch (p.type) {
      case kHalfKeys:
        return to_float(reinterpret_cast<const H*>(from)[d]);
      case kBfloat16Keys:
        return __uint_as_float(static_cast<uint32>(reinterpret_cast<const uint16*>(from)[d]) << 16);
      case kFloat16Keys:
        return __half2float(reinterpret_cast<const __half*>(from)[d]);
      case kFloatKeys:
        return reinterpret_cast<const float*>(from)[d];
      default:
        return static_cast<float>(reinterpret_cast<const int8*>(from)[d]);
    }
  }

  // For GPUs before sm_80, in place of locate() and load().
  __device__ H value(int part, int key, int d) const {
    const float factor = p.type == kInt8Keys ? scale(part, scale_offset(key)) : 1.f;
    return to_half(factor * load_float(p.base + key_offset(key) + part * part_bytes(), d));
  }

#if __CUDA_ARCH__ >= 800
  __device__ void locate(int first, int keys, int thread) const {
    for (int i = thread; i < keys; i += 128) {
      const int key = first + i;
      offsets[i * step] = key < n ? key_offset(key) : -1;
      if (p.type == kInt8Keys && key < n) offsets[first_scale + i * step] = scale_offset(key);
    }
  }

  template <typename Rows>
  __device__ void load(H* to, int part, int /*first: see locate*/, int thread) const {
    constexpr int kParts = Rows::kDims / 8, kThreadVectors = Rows::kKeys * kParts / 128;
    const char* const base = p.base + part * part_bytes();
    if (p.type == kHalfKeys && p.head_dim % 8 == 0 && p.block_bytes % 16 == 0) {
#pragma unroll 4
      for (int i = thread; i < Rows::kKeys * kParts; i += 128) {
        const int key = i / kParts, d = i % kParts * 8;
        const int64 offset = offsets[key * step];
        const bool valid = offset >= 0 && d < p.head_dim;
        copy_async(to + Rows::at(key, d), valid ? base + offset + 2 * d : p.base, valid ? 16 : 0);
      }
    } else if (p.type == kInt8Keys && p.head_dim % 8 == 0 && p.block_bytes % 8 == 0) {
      constexpr int kBatch = kThreadVectors < 8 ? kThreadVectors : 8;  // loads in flight
      for (int begin = thread; begin < Rows::kKeys * kParts; begin += 128 * kBatch) {
        uint2 bytes[kBatch];
        float factors[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int i = begin + 128 * j, key = i / kParts, d = i % kParts * 8;
          const int64 offset = offsets[key * step];
          const bool valid = offset >= 0 && d < p.head_dim;
          bytes[j] = valid ? *reinterpret_cast<const uint2*>(base + offset + d) : make_uint2(0, 0);
          factors[j] = valid ? scale(part, offsets[first_scale + key * step]) : 0.f;
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int i = begin + 128 * j, key = i / kParts, d = i % kParts * 8;
          uint32 pairs[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int pair = static_cast<int>(k < 2 ? bytes[j].x : bytes[j].y) >> (k % 2 * 16);
            pairs[k] = as_bits(
                to_half2(factors[j] * static_cast<int8>(pair), factors[j] * static_cast<int8>(pair >> 8)));
          }
          *reinterpret_cast<uint4*>(to + Rows::at(key, d)) =
              make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
    } else {
      for (int i = thread; i < Rows::kKeys * kParts; i += 128) {
        const int key = i / kParts, d = i % kParts * 8;
        const int64 offset = offsets[key * step];
        const float factor =
            offset >= 0 && p.type == kInt8Keys ? scale(part, offsets[first_scale + key * step]) : 1.f;
        uint32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int from = d + 2 * j;
          const bool valid = offset >= 0 && from < p.head_dim;
          pairs[j] = valid ? as_bits(to_half2(factor * load_float(base + offset, from),
                                              factor * load_float(base + offset, from + 1)))
                           : 0;
        }
        *reinterpret_cast<uint4*>(to + Rows::at(key, d)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
  }
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __device__ bool use_tensor_map() const { return p.use_tensor_map != 0; }
  // Number of KV blocks that contain the keys of a tile of keys.
  __device__ int blocks(int tile) const {
    return (min(kHopperKeys, n - tile * kHopperKeys) + p.block_tokens - 1) / p.block_tokens;
  }
  __device__ int column_bytes(int tile) const { return blocks(tile) * p.block_tokens * 128; }
  template <int kColumns>
  __device__ void copy(uint32 to, int part, int tile, uint32 barrier) const {
    const int first = tile * (kHopperKeys / p.block_tokens), count = blocks(tile);
    for (int block = 0; block < count; ++block) {
      const int index = table[first + block];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        copy_box(to + (i * kHopperKeys + block * p.block_tokens) * 128, p.keys, 64 * i, 0,
                 part * p.heads + head, index, barrier);
      }
    }
  }
#endif
};

// Work of a block of threads.
struct Work {
  Job job;
  const int* table;
};

// Work for queries `begin` to begin + queries - 1 of a tile of queries. job.n is 0 or less if the chunk has
// no such queries.
__device__ inline Work work_of(const PagedAttention& p, int tile, int head, int begin, int queries) {
  const int chunk = p.tiles[2 * tile], offset = p.tiles[2 * tile + 1] + begin;
  const int first = p.chunks[4 * chunk], n = p.chunks[4 * chunk + 1], past = p.chunks[4 * chunk + 2];
  Job job;
  job.n = min(queries, n - offset);
  job.first_position = past + offset;
  job.n_keys = job.first_position + job.n;
  job.q_stride = job.y_stride = static_cast<int64>(p.heads) * p.head_dim;
  const int64 start = (first + offset) * job.q_stride + head * p.head_dim;
  job.q = static_cast<const H*>(p.q) + start;
  job.y = static_cast<H*>(p.y) + start;
  job.head_dim = p.head_dim;
  job.causal = true;
  job.scale = 1;  // rotate_and_store() has scaled the queries
  return {job, p.blocks + static_cast<int64>(p.chunks[4 * chunk + 3]) * p.max_blocks};
}

template <int kPaddedDim>
__device__ inline void prompt(const PagedAttention& p) {
  extern __shared__ __align__(16) char raw_shared[];
  wait_for_predecessors();
  start_successors();
  const int head = blockIdx.x;
  const Work work =
      work_of(p, gridDim.y - 1 - blockIdx.y, head, blockIdx.z * kAttentionQueries, kAttentionQueries);
  if (work.job.n <= 0) return;
  // With kOffsetsInRows (attention_prompt.h) row i of the queries has the offsets of key i and of its scale
  // in its last 8 values.
  constexpr bool kInRows = kOffsetsInRows<kPaddedDim>;
  constexpr int kBegin = kInRows ? 2 * kPaddedDim : kAttentionRowBytes<kPaddedDim>;
  constexpr int kStep = kInRows ? 2 * (kPaddedDim + 8) / 8 : 1;
  constexpr int kFirstScale = kInRows ? 1 : kAttentionKeys<kPaddedDim>;
  int64* const offsets = reinterpret_cast<int64*>(raw_shared + kBegin);
  attend<kPaddedDim>(work.job, PagedKeys{p, work.table, head, work.job.n_keys, offsets, kStep, kFirstScale});
}

#define QVL_PROMPT(D)                                                  \
  extern "C" __global__ void __launch_bounds__(kAttentionThreads)      \
      attention_prompt_##D(const __grid_constant__ PagedAttention p) { \
    prompt<D>(p);                                                      \
  }
QVL_PROMPT(16)
QVL_PROMPT(32)
QVL_PROMPT(64)
QVL_PROMPT(128)
QVL_PROMPT(256)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int kPaddedDim>
__device__ inline void prompt_hopper(const PagedAttention& p) {
  extern __shared__ char raw_shared[];
  wait_for_predecessors();
  start_successors();
  const int head = blockIdx.x;
  const Work work = work_of(p, gridDim.y - 1 - blockIdx.y, head, 0, kAttentionTile);
  // After the queries, two tiles of keys and two of values, of the same size, aligned as in attend_hopper().
  char* const aligned = raw_shared + (-shared_address(raw_shared) & 1023);
  int64* const offsets = reinterpret_cast<int64*>(aligned + 5 * kHopperKeys * ((kPaddedDim + 63) / 64 * 128));
  attend_hopper<kPaddedDim>(
      work.job, PagedKeys{p, work.table, head, work.job.n_keys, offsets, /*step=*/1, kHopperKeys});
}

#define QVL_PROMPT_HOPPER(D)                                                  \
  extern "C" __global__ void __launch_bounds__(kHopperThreads, 1)             \
      attention_prompt_hopper_##D(const __grid_constant__ PagedAttention p) { \
    prompt_hopper<D>(p);                                                      \
  }
QVL_PROMPT_HOPPER(64)
QVL_PROMPT_HOPPER(128)

#endif

}  // namespace qvl::cuda
