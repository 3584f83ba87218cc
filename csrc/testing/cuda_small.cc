// C interface to the elementwise, adapter, image and sampling kernels, for tests/cuda, with the parameters of
// the launchers in cuda/ops.h and cuda/low_rank.h, except that numbers are int64_t or double, as `run` of
// tests/cuda/small.py passes them. Pointers are device memory. The functions with a stream return NULL or an
// error message. bfloat16: 1: compute in bfloat16; 0: in float16.
#include "core/error.h"
#include "cuda/low_rank.h"
#include "cuda/ops.h"
#include "testing/gpu.h"

using namespace qvl;
using namespace qvl::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Call body(gpu) with the GPU's context current; return NULL, or the message of its exception.
template <typename Body>
const char* on_gpu(int64_t bfloat16, Body&& body) {
  static thread_local qvl_error error;
  const qvl_status status = guarded(&error, [&] {
    const Gpu& gpu = test_gpu(bfloat16 != 0);
    const CurrentContext current(gpu.context());
    body(gpu);
  });
  return status == QVL_OK ? nullptr : error.message;
}

int as_int(int64_t value) {
  return static_cast<int>(value);
}

}  // namespace

EXPORT const char* qvlt_gpu_rms_norm(int64_t bfloat16, CUstream stream, const float* x, const float* weight,
                                     double epsilon, int64_t n, int64_t width, void* y) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    rms_norm(gpu, stream, x, weight, static_cast<float>(epsilon), as_int(n), as_int(width), y);
  });
}

EXPORT const char* qvlt_gpu_gather_columns(int64_t bfloat16, CUstream stream, const void* x, int64_t x_stride,
                                           const int32_t* order, int64_t n, int64_t in, int64_t y_stride,
                                           void* y) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    gather_columns(gpu, stream, x, x_stride, order, as_int(n), as_int(in), y_stride, y);
  });
}

EXPORT uint64_t qvlt_gpu_low_rank_scratch(int64_t n, int64_t low_stride) {
  return low_rank_scratch(as_int(n), as_int(low_stride));
}

// low_rank_down, then low_rank_up. adapters: [n] addresses of tables of LowRankEntry (kernels/low_rank.h),
// in which `product` is an index; raw: float32 [n, out], W x; with the epilogues kAdd and kFloat it is NULL,
// and B A x is added to y; scratch: qvlt_gpu_low_rank_scratch() bytes, zero.
EXPORT const char* qvlt_gpu_low_rank(int64_t bfloat16, CUstream stream, const uint64_t* adapters,
                                     const int32_t* order, int64_t product, const void* x, int64_t x_stride,
                                     int64_t in, int64_t n, int64_t rank, void* low, void* scratch,
                                     int64_t low_stride, int64_t out, const float* raw, int64_t epilogue,
                                     void* y) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    const AdaptedRows rows{adapters, order, as_int(n), as_int(product)};
    const LowRankMemory memory{low, scratch, as_int(n), as_int(low_stride)};
    low_rank_down(gpu, stream, rows, x, x_stride, as_int(in), as_int(rank), /*x_is_complete=*/false, memory);
    low_rank_up(gpu, stream, rows, memory, as_int(out), raw, static_cast<Epilogue>(epilogue), y);
  });
}

EXPORT const char* qvlt_gpu_finish_raw(int64_t bfloat16, CUstream stream, const float* raw, int64_t n,
                                       int64_t out, int64_t epilogue, void* y) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    finish_raw(gpu, stream, raw, as_int(n), as_int(out), static_cast<Epilogue>(epilogue), y);
  });
}

EXPORT const char* qvlt_gpu_embed(int64_t bfloat16, CUstream stream, const void* wte, int64_t vocab,
                                  int64_t width, const int32_t* ids, const uint64_t* features, int64_t n,
                                  float* x) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    embed(gpu, stream, wte, as_int(vocab), as_int(width), ids, features, as_int(n), x);
  });
}

EXPORT const char* qvlt_gpu_rotate_and_store(int64_t bfloat16, CUstream stream, const void* qkv,
                                             const int32_t* positions, const int32_t* angle_tables,
                                             const int32_t* tables, const int32_t* blocks, int64_t max_blocks,
                                             const float* cos, const float* sin, const float* query_scale,
                                             int64_t max_positions, char* base, int64_t block_bytes,
                                             int64_t block_tokens, int64_t dtype, int64_t heads,
                                             int64_t head_dim, int64_t n, void* q) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    const RowMetadata metadata{positions, angle_tables, tables, blocks, as_int(max_blocks)};
    const Angles angles{cos, sin, query_scale, as_int(max_positions)};
    const KvLayer layer{base,
                        static_cast<uint64_t>(block_bytes),
                        as_int(block_tokens),
                        static_cast<qvl_dtype>(dtype),
                        as_int(heads),
                        as_int(head_dim)};
    rotate_and_store(gpu, stream, qkv, metadata, angles, layer, as_int(n), q);
  });
}

EXPORT const char* qvlt_gpu_cut_patches(int64_t bfloat16, CUstream stream, const float* images, int64_t n,
                                        int64_t size, int64_t patch, int64_t stride, void* y) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    cut_patches(gpu, stream, images, as_int(n), as_int(size), as_int(patch), as_int(stride), y);
  });
}

EXPORT const char* qvlt_gpu_layer_norm(int64_t bfloat16, CUstream stream, const float* x, const float* weight,
                                       const float* bias, double epsilon, int64_t n, int64_t width,
                                       const float* add, int64_t period, void* y_half, float* y_float) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    layer_norm(gpu, stream, x, weight, bias, static_cast<float>(epsilon), as_int(n), as_int(width), add,
               as_int(period), y_half, y_float);
  });
}

EXPORT const char* qvlt_gpu_add_rows(int64_t bfloat16, CUstream stream, float* x, const float* add, int64_t n,
                                     int64_t width, int64_t period) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    add_rows(gpu, stream, x, add, as_int(n), as_int(width), as_int(period));
  });
}

EXPORT int64_t qvlt_gpu_sample_scratch(int64_t n, int64_t vocab) {
  return static_cast<int64_t>(sample_scratch(as_int(n), as_int(vocab)));
}

EXPORT const char* qvlt_gpu_sample(int64_t bfloat16, CUstream stream, const float* logits, int64_t n,
                                   int64_t vocab, const void* picks, const int32_t* forbidden,
                                   int64_t any_draw, int64_t any_changed, void* scratch, int32_t* tokens,
                                   float* logprobs, int64_t n_top, int32_t* top_tokens, float* top_logprobs) {
  return on_gpu(bfloat16, [&](const Gpu& gpu) {
    const SampleOutputs outputs{tokens, logprobs, as_int(n_top), top_tokens, top_logprobs};
    sample(gpu, stream, logits, as_int(n), as_int(vocab), static_cast<const Pick*>(picks), forbidden,
           any_draw != 0, any_changed != 0, scratch, outputs);
  });
}
