// Causal attention of prompts over a paged cache.
//
// A block has up to 64 queries of a piece, for one head. Keys and values are converted to H on their way to
// shared memory, whatever the cache holds. Layout and cost: attention.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels/attention_prompt.h"

#include "cuda/kernels/attention.cuh"

namespace qvl::cuda {

struct PagedKeys {
  const PagedAttention& p;
  const int* table;  // the sequence's blocks
  int head, n;

  // Where head_dim values of a key or value lie.
  __device__ const char* at(int part, int key, int bytes) const {
    const int64 row = static_cast<int64>(part * p.heads + head) * p.block_tokens + key % p.block_tokens;
    return p.base + table[key / p.block_tokens] * p.block_bytes + row * p.head_dim * bytes;
  }
  __device__ float scale(int part, int key) const {
    const int64 rows = static_cast<int64>(p.heads) * p.block_tokens;
    const char* block = p.base + table[key / p.block_tokens] * p.block_bytes + 2 * rows * p.head_dim;
    return reinterpret_cast<const float*>(block)[part * rows + head * p.block_tokens + key % p.block_tokens];
  }

  __device__ H value(int part, int key, int d) const {
    switch (p.type) {
      case kHalfKeys:
        return reinterpret_cast<const H*>(at(part, key, 2))[d];
      case kBfloat16Keys:
        return to_half(
            __uint_as_float(static_cast<uint32>(reinterpret_cast<const uint16*>(at(part, key, 2))[d]) << 16));
      case kFloat16Keys:
        return to_half(__half2float(reinterpret_cast<const __half*>(at(part, key, 2))[d]));
      case kFloatKeys:
        return to_half(reinterpret_cast<const float*>(at(part, key, 4))[d]);
      default:
        return to_half(scale(part, key) * static_cast<float>(at(part, key, 1)[d]));
    }
  }

#if __CUDA_ARCH__ >= 800
  template <int D>
  __device__ void load(H* to, int part, int first) const {
    if (p.type == kHalfKeys && p.head_dim % 8 == 0 && p.block_bytes % 16 == 0) {
      for (int i = threadIdx.x; i < kAttentionKeys<D> * D / 8; i += kAttentionThreads) {
        const int key = i / (D / 8), d = i % (D / 8) * 8;
        const bool there = first + key < n && d < p.head_dim;
        copy_async(to + key * (D + 8) + d, there ? at(part, first + key, 2) + 2 * d : p.base, there ? 16 : 0);
      }
      return;
    }
    // Eight neighbouring values a thread: the compiler merges what it may of their loads.
    for (int i = threadIdx.x; i < kAttentionKeys<D> * D / 8; i += kAttentionThreads) {
      const int key = i / (D / 8), d = i % (D / 8) * 8;
      uint32 pairs[4] = {};
      if (first + key < n) {
        if (p.type == kInt8Keys && p.head_dim % 8 == 0 && p.block_bytes % 8 == 0) {
          if (d < p.head_dim) {
            const float factor = scale(part, first + key);
            const uint2 bytes = *reinterpret_cast<const uint2*>(at(part, first + key, 1) + d);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int two = static_cast<int>(j < 2 ? bytes.x : bytes.y) >> (j % 2 * 16);
              pairs[j] =
                  as_bits(to_half2(factor * static_cast<int8>(two), factor * static_cast<int8>(two >> 8)));
            }
          }
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (d + 2 * j >= p.head_dim) continue;
            const H low = value(part, first + key, d + 2 * j), high = value(part, first + key, d + 2 * j + 1);
            pairs[j] = as_bits(H2(low, high));
          }
        }
      }
      *reinterpret_cast<uint4*>(to + key * (D + 8) + d) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
#endif
};

template <int D>
__device__ inline void prompt(const PagedAttention& p) {
  wait_for_predecessors();
  const int piece = p.tiles[2 * blockIdx.x], offset = p.tiles[2 * blockIdx.x + 1], head = blockIdx.y;
  const int first = p.pieces[4 * piece], n = p.pieces[4 * piece + 1], past = p.pieces[4 * piece + 2];
  Job job;
  job.n = min(kAttentionTile, n - offset);
  job.first_position = past + offset;
  job.n_keys = job.first_position + job.n;
  job.q_stride = job.y_stride = static_cast<int64>(p.heads) * p.head_dim;
  const int64 at = (first + offset) * job.q_stride + head * p.head_dim;
  job.q = static_cast<const H*>(p.q) + at;
  job.y = static_cast<H*>(p.y) + at;
  job.head_dim = p.head_dim;
  job.causal = true;
  job.scale = 1;
  const int* table = p.blocks + static_cast<int64>(p.pieces[4 * piece + 3]) * p.max_blocks;
  attend<D>(job, PagedKeys{p, table, head, job.n_keys});
  start_successors();
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

}  // namespace qvl::cuda
