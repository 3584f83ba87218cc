// Attention of decode steps: kernels/attention_decode.cu.
#include "cuda/kernels/attention_decode.h"

#include <string>

#include "core/error.h"
#include "cuda/ops.h"

namespace qvl::cuda {
namespace {

// As in the kernel.
constexpr int kChunk = 128, kThreads = 128, kFastDim = 128, kMostDim = 256;

int chunks_of(int max_keys) {
  return (max_keys + kChunk - 1) / kChunk;
}

uint64_t parts_of(int n, int heads, int max_keys) {
  return static_cast<uint64_t>(n) * static_cast<uint64_t>(heads) * static_cast<uint64_t>(chunks_of(max_keys));
}

}  // namespace

uint64_t attention_decode_scratch(int n, int heads, int head_dim, int max_keys) {
  return parts_of(n, heads, max_keys) * (static_cast<uint64_t>(head_dim) + 2) * sizeof(float);
}

void attention_decode(const Gpu& gpu, CUstream stream, const void* q, const Places& places,
                      const KvLayer& cache, int n, int max_keys, void* scratch, void* y) {
  QVL_REQUIRE(cache.head_dim <= kMostDim && cache.head_dim % 2 == 0, QVL_UNSUPPORTED,
              "heads of %d values: a GPU takes even numbers up to %d", cache.head_dim, kMostDim);
  AttentionDecode p{};
  p.q = q;
  p.positions = places.positions;
  p.tables = places.tables;
  p.blocks = places.blocks;
  p.max_blocks = places.max_blocks;
  p.block_tokens = cache.block_tokens;
  p.base = cache.base;
  p.block_bytes = cache.block_bytes;
  p.heads = cache.heads;
  p.head_dim = cache.head_dim;
  p.chunks = chunks_of(max_keys);
  p.parts = static_cast<float*>(scratch);
  p.sums = p.parts + 2 * parts_of(n, cache.heads, max_keys);
  p.y = y;
  const char* type = cache.dtype == QVL_BFLOAT16  ? "bfloat16"
                     : cache.dtype == QVL_FLOAT16 ? "float16"
                     : cache.dtype == QVL_FLOAT32 ? "float32"
                                                  : "int8";
  // The fast kernels need 64 KB of shared memory in 16 bits, which sm_75 has not quite.
  const int value = cache.dtype == QVL_INT8 ? 1 : 2;
  const bool fast = cache.head_dim == kFastDim && cache.dtype != QVL_FLOAT32 && cache.block_bytes % 16 == 0 &&
                    (gpu.arch() != 75 || value == 1);
  const auto heads = static_cast<unsigned>(cache.heads), rows = static_cast<unsigned>(n);
  gpu.launch(stream, (std::string("attention_decode_") + (fast ? "" : "any_") + type).c_str(),
             {static_cast<unsigned>(p.chunks), heads, rows}, kThreads,
             fast ? 2 * kChunk * kFastDim * value : 0, p, true);
  gpu.launch(stream, "attention_decode_combine", {heads, rows}, (cache.head_dim + 31) / 32 * 32, 0, p, true);
}

}  // namespace qvl::cuda
