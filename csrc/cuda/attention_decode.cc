// Launches of kernels/attention_decode.cu.
#include "cuda/kernels/attention_decode.h"

#include <string>

#include "core/error.h"
#include "cuda/ops.h"

namespace qvl::cuda {
namespace {

// As in kernels/attention_decode.cu: keys per chunk, threads per block, head_dim of the fast kernels, maximum
// head_dim.
constexpr int kChunk = 128, kThreads = 128, kFastDim = 128, kMaxDim = 256;
constexpr int kMaxRows = 256;  // of a call

int n_chunks(int max_keys) {
  return (max_keys + kChunk - 1) / kChunk;
}

// Number of partial results: one per row, head and chunk.
uint64_t n_parts(int n, int heads, int max_keys) {
  return static_cast<uint64_t>(n) * static_cast<uint64_t>(heads) * static_cast<uint64_t>(n_chunks(max_keys));
}

// Number of counters, for the maximum number of rows, so that the memory after them has a fixed offset.
uint64_t n_counters(int heads) {
  return kMaxRows * static_cast<uint64_t>(heads);
}

// Whether the kernels attention_decode_TYPE apply; otherwise attention_decode_any_TYPE are used.
bool is_fast(const Gpu& gpu, const KvLayer& cache) {
  // With a 16-bit cache the kernels need 64 KiB of shared memory and a few bytes more; sm_75 has 64 KiB.
  return cache.head_dim == kFastDim && cache.dtype != QVL_FLOAT32 && cache.block_bytes % 16 == 0 &&
         (gpu.arch() != 75 || cache.dtype == QVL_INT8);
}

// Whether there are so few blocks of threads, at most 8 per multiprocessor, that latencies dominate: the
// kernel then also merges the chunks, and in attention_step, if is_fast(), rotates and stores.
bool is_small(const Gpu& gpu, const KvLayer& cache, int n, int max_keys) {
  return n_parts(n, cache.heads, max_keys) <= 8 * static_cast<uint64_t>(gpu.multiprocessors());
}

AttentionDecode params(const Gpu& gpu, const RowMetadata& metadata, const KvLayer& cache, int n, int max_keys,
                       void* scratch, void* y) {
  QVL_REQUIRE(cache.head_dim <= kMaxDim && cache.head_dim % 2 == 0, QVL_UNSUPPORTED,
              "head_dim is %d; a GPU needs an even number up to %d", cache.head_dim, kMaxDim);
  QVL_REQUIRE(n >= 1 && n <= kMaxRows, QVL_INTERNAL, "attention of %d rows", n);
  AttentionDecode p{};
  p.positions = metadata.positions;
  p.tables = metadata.tables;
  p.blocks = metadata.blocks;
  p.max_blocks = metadata.max_blocks;
  p.block_tokens = cache.block_tokens;
  p.base = cache.base;
  p.block_bytes = cache.block_bytes;
  p.heads = cache.heads;
  p.head_dim = cache.head_dim;
  p.chunks = n_chunks(max_keys);
  auto* const counters = static_cast<unsigned*>(scratch);
  p.counters = is_small(gpu, cache, n, max_keys) ? counters : nullptr;
  p.parts = reinterpret_cast<float*>(counters + n_counters(cache.heads));
  p.sums = p.parts + 2 * n_parts(n, cache.heads, max_keys);
  p.y = y;
  return p;
}

void launch(const Gpu& gpu, CUstream stream, const AttentionDecode& p, const KvLayer& cache, int n) {
  const char* type = cache.dtype == QVL_BFLOAT16  ? "bfloat16"
                     : cache.dtype == QVL_FLOAT16 ? "float16"
                     : cache.dtype == QVL_FLOAT32 ? "float32"
                                                  : "int8";
  const bool fast = is_fast(gpu, cache);
  const int shared = fast ? 2 * kChunk * kFastDim * (cache.dtype == QVL_INT8 ? 1 : 2) : 0;
  const auto heads = static_cast<unsigned>(p.heads), rows = static_cast<unsigned>(n);
  gpu.launch(stream, (std::string("attention_decode_") + (fast ? "" : "any_") + type).c_str(),
             {heads, static_cast<unsigned>(p.chunks), rows}, kThreads, shared, p, /*early=*/true);
  if (p.counters == nullptr)
    gpu.launch(stream, "attention_decode_combine", {heads, rows}, (p.head_dim + 31) / 32 * 32, 0, p,
               /*early=*/true);
}

}  // namespace

uint64_t attention_decode_scratch(int n, int heads, int head_dim, int max_keys) {
  const uint64_t part_floats = static_cast<uint64_t>(head_dim) + 2;
  return n_counters(heads) * sizeof(unsigned) + n_parts(n, heads, max_keys) * part_floats * sizeof(float);
}

void attention_decode(const Gpu& gpu, CUstream stream, const void* q, const RowMetadata& metadata,
                      const KvLayer& cache, int n, int max_keys, void* scratch, void* y) {
  AttentionDecode p = params(gpu, metadata, cache, n, max_keys, scratch, y);
  p.q = q;
  launch(gpu, stream, p, cache, n);
}

void attention_step(const Gpu& gpu, CUstream stream, const void* qkv, const RowMetadata& metadata,
                    const Angles& angles, const KvLayer& cache, int n, int max_keys, void* q, void* scratch,
                    void* y) {
  AttentionDecode p = params(gpu, metadata, cache, n, max_keys, scratch, y);
  // Allowed by the conditions of ops.h: row i is of sequence i, and its earlier keys are complete.
  p.tables = nullptr;
  p.early = 1;
  if (is_fast(gpu, cache) && is_small(gpu, cache, n, max_keys)) {
    p.qkv = qkv;
    p.angle_tables = metadata.angle_tables;
    p.cos = angles.cos;
    p.sin = angles.sin;
    p.query_scale = angles.query_scale;
    p.max_positions = angles.max_positions;
  } else {
    rotate_and_store(gpu, stream, qkv, metadata, angles, cache, n, q);
    p.q = q;
  }
  launch(gpu, stream, p, cache, n);
}

}  // namespace qvl::cuda
