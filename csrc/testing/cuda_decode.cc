// C interface to the launchers of decode steps, of uploads of matrices and of linear_prompt in cuda/ops.h,
// and to low_rank_down (cuda/low_rank.h), for tests/cuda and benchmarks/gpu/products.py. Pointers are device
// memory, except those of decode_matrix_bytes. Functions that return a string return NULL or an error
// message. The GPU's primary context must be current in the calling thread; PyTorch, which the callers use,
// makes it current. storage, dtype and epilogue: values of Storage, qvl_dtype and Epilogue.
#include <exception>
#include <string>

#include "cuda/low_rank.h"
#include "cuda/ops.h"
#include "cuda/tensor_map.h"
#include "testing/gpu.h"

using namespace qvl;
using namespace qvl::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// half: compute type of the kernels; 0: bfloat16, 1: float16.
const Gpu& gpu(int half) {
  return test_gpu(half == 0);
}

// Call `body`; return NULL, or the message of its exception, valid until the next error of this thread.
template <typename Body>
const char* error_message(Body&& body) {
  static thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

Matrix matrix(int storage, int out, int in, int stride, void* values, void* scales, const float* bias) {
  return {static_cast<Storage>(storage), out, in, stride, values, scales, bias};
}

}  // namespace

EXPORT void decode_matrix_bytes(int storage, int out, int in, uint64_t* values, uint64_t* scales) {
  const MatrixBytes bytes = matrix_bytes(static_cast<Storage>(storage), out, in);
  *values = bytes.values;
  *scales = bytes.scales;
}

// Row r of `from` becomes row first + r * step of the matrix.
EXPORT const char* decode_upload(int half, CUstream stream, int dtype, const void* from, int rows,
                                 int storage, int out, int in, int stride, void* values, void* scales,
                                 int first, int step) {
  return error_message([&] {
    upload_matrix(gpu(half), stream, dtype, from, rows,
                  matrix(storage, out, in, stride, values, scales, nullptr), first, step);
  });
}

EXPORT const char* decode_linear(int half, CUstream stream, int storage, int out, int in, int stride,
                                 void* values, void* scales, const float* bias, const void* x,
                                 int64_t x_stride, int n, int epilogue, void* y) {
  return error_message([&] {
    linear_decode(gpu(half), stream, matrix(storage, out, in, stride, values, scales, bias), x, x_stride, n,
                  static_cast<Epilogue>(epilogue), y);
  });
}

// decode_linear, then low_rank_down, which writes A x of each row with an adapter to `low` (A: the adapter's
// first factor). adapters, order and product: as in AdaptedRows; low, scratch and low_stride: as in
// LowRankMemory; rank: as for low_rank_down (cuda/low_rank.h). On Hopper, the GPU with has_tensor_maps(),
// low_rank_next delays the start of low_rank_down until x is complete.
EXPORT const char* decode_adapted(int half, CUstream stream, int storage, int out, int in, int stride,
                                  void* values, void* scales, const void* x, int64_t x_stride, int n,
                                  int epilogue, void* y, const uint64_t* adapters, const int32_t* order,
                                  int product, int rank, void* low, void* scratch, int low_stride) {
  return error_message([&] {
    const AdaptedRows rows{adapters, order, n, product};
    linear_decode(gpu(half), stream, matrix(storage, out, in, stride, values, scales, nullptr), x, x_stride,
                  n, static_cast<Epilogue>(epilogue), y, /*low_rank_next=*/true);
    low_rank_down(gpu(half), stream, rows, x, x_stride, in, rank,
                  /*x_is_complete=*/has_tensor_maps(gpu(half)), {low, scratch, n, low_stride});
  });
}

EXPORT const char* decode_prompt_linear(int half, CUstream stream, int storage, int out, int in, int stride,
                                        void* values, void* scales, const float* bias, const void* x,
                                        int64_t x_stride, int n, int epilogue, void* y, void* scratch) {
  return error_message([&] {
    linear_prompt(gpu(half), stream, matrix(storage, out, in, stride, values, scales, bias), x, x_stride, n,
                  static_cast<Epilogue>(epilogue), y, scratch);
  });
}

// Bytes of `scratch` of decode_attention and decode_step, which the caller sets to zero once.
EXPORT uint64_t decode_attention_scratch(int n, int heads, int head_dim, int max_keys) {
  return attention_decode_scratch(n, heads, head_dim, max_keys);
}

EXPORT const char* decode_attention(int half, CUstream stream, const void* q, const int32_t* positions,
                                    const int32_t* tables, const int32_t* blocks, int max_blocks, char* base,
                                    uint64_t block_bytes, int block_tokens, int dtype, int heads,
                                    int head_dim, int n, int max_keys, void* scratch, void* y) {
  return error_message([&] {
    const RowMetadata metadata{positions, nullptr, tables, blocks, max_blocks};
    const KvLayer cache{base, block_bytes, block_tokens, dtype, heads, head_dim};
    attention_decode(gpu(half), stream, q, metadata, cache, n, max_keys, scratch, y);
  });
}

// fused: 1: one call of attention_step; 0: rotate_and_store, then attention_decode.
EXPORT const char* decode_step(int half, CUstream stream, int fused, const void* qkv,
                               const int32_t* positions, const int32_t* angle_tables, const int32_t* tables,
                               const int32_t* blocks, int max_blocks, const float* cos, const float* sin,
                               const float* query_scale, int max_positions, char* base, uint64_t block_bytes,
                               int block_tokens, int dtype, int heads, int head_dim, int n, int max_keys,
                               void* q, void* scratch, void* y) {
  return error_message([&] {
    const RowMetadata metadata{positions, angle_tables, tables, blocks, max_blocks};
    const Angles angles{cos, sin, query_scale, max_positions};
    const KvLayer cache{base, block_bytes, block_tokens, dtype, heads, head_dim};
    if (fused != 0) {
      attention_step(gpu(half), stream, qkv, metadata, angles, cache, n, max_keys, q, scratch, y);
      return;
    }
    rotate_and_store(gpu(half), stream, qkv, metadata, angles, cache, n, q);
    attention_decode(gpu(half), stream, q, metadata, cache, n, max_keys, scratch, y);
  });
}
