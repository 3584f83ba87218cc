// Launches of kernels/attention_prompt.cu.
#include "cuda/kernels/attention_prompt.h"
#include "core/error.h"
#include "cuda/attention.h"
#include "cuda/ops.h"
#include "cuda/tensor_map.h"

namespace qvl::cuda {
namespace {

int key_type(const Gpu& gpu, qvl_dtype dtype) {
  switch (dtype) {
    case QVL_BFLOAT16:
      return gpu.half() == Half::kBfloat16 ? kHalfKeys : kBfloat16Keys;
    case QVL_FLOAT16:
      return gpu.half() == Half::kFloat16 ? kHalfKeys : kFloat16Keys;
    case QVL_FLOAT32:
      return kFloatKeys;
    case QVL_INT8:
      return kInt8Keys;
    default:
      fail(QVL_INTERNAL, "attention of prompts: keys of type %d", static_cast<int>(dtype));
  }
}

}  // namespace

// portable: true only in tests (attention.h).
void attention_prompt_with(const Gpu& gpu, CUstream stream, bool portable, const void* q,
                           const PromptChunk* chunks, const Tile* tiles, int n_tiles, const int32_t* blocks,
                           int max_blocks, const KvLayer& kv, void* y) {
  static_assert(kAttentionTile == kQueryTile, "tiles of the caller are tiles of the kernels");
  static_assert(sizeof(PromptChunk) == 16 && sizeof(Tile) == 8,
                "the kernels read them as arrays of integers");
  QVL_REQUIRE(kv.head_dim % 2 == 0 && kv.head_dim <= 256, QVL_UNSUPPORTED,
              "attention of prompts: head_dim is %d; it must be an even number up to 256", kv.head_dim);
  struct Kernel {
    const char* name;
    int dim;  // padded head_dim
    int shared_bytes;
  };
#define QVL_KERNEL(D) {"attention_prompt_" #D, D, kAttentionShared<D>}
#define QVL_KERNEL_HOPPER(D)                           \
  {                                                    \
    "attention_prompt_hopper_" #D, D, kHopperShared<D> \
  }
  constexpr Kernel kPortable[] = {QVL_KERNEL(16), QVL_KERNEL(32), QVL_KERNEL(64), QVL_KERNEL(128),
                                  QVL_KERNEL(256)};
  constexpr Kernel kHopper[] = {QVL_KERNEL_HOPPER(64), QVL_KERNEL_HOPPER(128)};
  const bool hopper = gpu.arch() == 90 && kv.head_dim <= 128 && !portable;
  const Kernel* kernel = hopper ? kHopper : kPortable;
  while (kernel->dim < kv.head_dim) ++kernel;
  PagedAttention params;
  params.q = q;
  params.y = y;
  params.chunks = reinterpret_cast<const int*>(chunks);
  params.tiles = reinterpret_cast<const int*>(tiles);
  params.blocks = blocks;
  params.base = kv.base;
  params.block_bytes = kv.block_bytes;
  params.max_blocks = max_blocks;
  params.block_tokens = kv.block_tokens;
  params.type = key_type(gpu, kv.dtype);
  params.heads = kv.heads;
  params.head_dim = kv.head_dim;
  // A copy loads all tokens of a block of the cache: a tile of keys must consist of whole blocks, and a block
  // of whole groups of 8 rows (hopper.cuh). Strides must be multiples of 16 bytes, 8 values. The map covers
  // keys and values (2 * heads); a box has 64 values of each token, a row in the layout of hopper.cuh.
  params.use_tensor_map = hopper && params.type == kHalfKeys && kv.head_dim % 8 == 0 &&
                          kv.block_tokens % 8 == 0 && kHopperKeys % kv.block_tokens == 0 &&
                          kv.block_bytes % 16 == 0;
  if (params.use_tensor_map) {
    const int64_t head_bytes = int64_t{2} * kv.block_tokens * kv.head_dim;
    constexpr int64_t kBlocks = INT32_MAX;  // any upper bound
    params.keys = tensor_map(gpu, kv.base, {kv.head_dim, kv.block_tokens, 2 * kv.heads, kBlocks},
                             {2 * kv.head_dim, head_bytes, static_cast<int64_t>(kv.block_bytes)},
                             {64, kv.block_tokens, 1, 1});
  }
  const Dim grid{static_cast<unsigned>(kv.heads), static_cast<unsigned>(n_tiles),
                 hopper ? 1u : kAttentionTile / kAttentionQueries};
  // Before sm_80 the kernels are plain loops without shared memory.
  gpu.launch(stream, kernel->name, grid, hopper ? kHopperThreads : kAttentionThreads,
             gpu.arch() >= 80 ? kernel->shared_bytes : 0, params, /*early=*/true);
}

void attention_prompt(const Gpu& gpu, CUstream stream, const void* q, const PromptChunk* chunks,
                      const Tile* tiles, int n_tiles, const int32_t* blocks, int max_blocks,
                      const KvLayer& kv, void* y) {
  attention_prompt_with(gpu, stream, /*portable=*/false, q, chunks, tiles, n_tiles, blocks, max_blocks, kv,
                        y);
}

}  // namespace qvl::cuda
