// C interface to linear_prompt (y = x W^T + bias for the tokens of prompts) and to the attention of prompts
// and images, for tests/cuda. Pointers are device memory. The functions with a stream return NULL or an error
// message. bfloat16: 1: compute in bfloat16; 0: in float16. portable: 1: use the kernels for any GPU even if
// this GPU has faster ones.
#include <string>

#include "core/error.h"
#include "cuda/attention.h"
#include "cuda/linear_prompt.h"
#include "testing/gpu.h"

using namespace qvl;
using namespace qvl::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Call `body`; return NULL, or the message of its exception, valid until the next call in this thread.
template <typename Body>
const char* error_message(Body&& body) {
  static thread_local qvl_error error;
  return guarded(&error, body) == QVL_OK ? nullptr : error.message;
}

}  // namespace

EXPORT int64_t qvlt_gpu_linear_prompt_tiles() {
  return linear_prompt_tiles(test_gpu(false));  // the same for bfloat16
}

EXPORT const char* qvlt_gpu_linear_prompt_tile_name(int64_t tile) {
  return linear_prompt_tile_name(static_cast<int>(tile));
}

// tile: index of a tile variant of Hopper; -1: the portable kernel; -2: linear_prompt, which chooses one
// of the others. Only -2 accepts quantized matrices and uses `scratch`.
EXPORT const char* qvlt_gpu_linear_prompt(int64_t bfloat16, CUstream stream, int64_t tile, int64_t storage,
                                          int64_t out, int64_t in, int64_t stride, void* values, void* scales,
                                          const float* bias, const void* x, int64_t x_stride, int64_t n,
                                          int64_t epilogue, void* y, void* scratch) {
  return error_message([&] {
    const Gpu& gpu = test_gpu(bfloat16 != 0);
    const CurrentContext current(gpu.context());
    const Matrix matrix{static_cast<Storage>(storage),
                        static_cast<int>(out),
                        static_cast<int>(in),
                        static_cast<int>(stride),
                        values,
                        scales,
                        bias};
    if (tile == -2) {
      linear_prompt(gpu, stream, matrix, x, x_stride, static_cast<int>(n), static_cast<Epilogue>(epilogue), y,
                    scratch);
    } else {
      linear_prompt_with(gpu, stream, static_cast<int>(tile), matrix, x, x_stride, static_cast<int>(n),
                         static_cast<Epilogue>(epilogue), y);
    }
  });
}

EXPORT const char* qvlt_gpu_attention_prompt(int64_t bfloat16, CUstream stream, int64_t portable,
                                             const void* q, const PromptChunk* chunks, const Tile* tiles,
                                             int64_t n_tiles, const int32_t* blocks, int64_t max_blocks,
                                             char* base, int64_t block_bytes, int64_t block_tokens,
                                             int64_t dtype, int64_t heads, int64_t head_dim, void* y) {
  return error_message([&] {
    const Gpu& gpu = test_gpu(bfloat16 != 0);
    const CurrentContext current(gpu.context());
    const KvLayer kv{base,
                     static_cast<uint64_t>(block_bytes),
                     static_cast<int>(block_tokens),
                     static_cast<qvl_dtype>(dtype),
                     static_cast<int>(heads),
                     static_cast<int>(head_dim)};
    attention_prompt_with(gpu, stream, portable != 0, q, chunks, tiles, static_cast<int>(n_tiles), blocks,
                          static_cast<int>(max_blocks), kv, y);
  });
}

EXPORT const char* qvlt_gpu_attention_dense(int64_t bfloat16, CUstream stream, int64_t portable,
                                            const void* q, const void* k, const void* v, int64_t q_image,
                                            int64_t q_stride, int64_t q_head, int64_t kv_image,
                                            int64_t kv_stride, int64_t kv_head, int64_t images,
                                            int64_t n_queries, int64_t n_keys, int64_t heads,
                                            int64_t head_dim, double scale, void* y) {
  return error_message([&] {
    const Gpu& gpu = test_gpu(bfloat16 != 0);
    const CurrentContext current(gpu.context());
    const DenseAttention a{q,
                           k,
                           v,
                           q_image,
                           q_stride,
                           q_head,
                           kv_image,
                           kv_stride,
                           kv_head,
                           static_cast<int>(images),
                           static_cast<int>(n_queries),
                           static_cast<int>(n_keys),
                           static_cast<int>(heads),
                           static_cast<int>(head_dim),
                           static_cast<float>(scale)};
    attention_dense_with(gpu, stream, portable != 0, a, y);
  });
}
