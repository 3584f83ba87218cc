// Launches of kernels/elementwise.cu.
#include "cuda/kernels/elementwise.h"
#include "core/error.h"
#include "cuda/ops.h"
#include "cuda/row_threads.h"

namespace qvl::cuda {
namespace {

int cache_type(qvl_dtype dtype) {
  switch (dtype) {
    case QVL_FLOAT32:
      return kCacheFloat32;
    case QVL_BFLOAT16:
      return kCacheBfloat16;
    case QVL_FLOAT16:
      return kCacheFloat16;
    case QVL_INT8:
      return kCacheInt8;
    default:
      fail(QVL_INTERNAL, "unknown cache dtype %d", dtype);
  }
}

}  // namespace

void rms_norm(const Gpu& gpu, CUstream stream, const float* x, const float* weight, float epsilon, int n,
              int width, void* y) {
  const RmsNormParams params{x, weight, y, width, epsilon};
  gpu.launch(stream, fits_registers(width) ? "rms_norm_held" : "rms_norm_any", {static_cast<unsigned>(n)},
             row_threads(width), 0, params, /*early=*/true);
}

void embed(const Gpu& gpu, CUstream stream, const void* wte, int vocab, int width, const int32_t* ids,
           const uint64_t* features, int n, float* x) {
  constexpr int kBlockValues = kEmbedThreads * kEmbedValues;
  const int parts = (width + kBlockValues - 1) / kBlockValues;
  // On the host uint64_t is a different type from unsigned long long, of the same size.
  const auto* addresses = reinterpret_cast<const unsigned long long*>(features);
  const EmbedParams params{wte, ids, addresses, x, vocab, width, parts};
  gpu.launch(stream, "embed", {static_cast<unsigned>(n) * static_cast<unsigned>(parts)}, kEmbedThreads, 0,
             params, /*early=*/true);
}

void gather_columns(const Gpu& gpu, CUstream stream, const void* x, int64_t x_stride, const int32_t* order,
                    int n, int in, int64_t y_stride, void* y) {
  const GatherParams params{x, order, y, x_stride, y_stride, in};
  const int columns = (in + kGatherThreads - 1) / kGatherThreads;
  gpu.launch(stream, "gather_columns", {static_cast<unsigned>(columns), static_cast<unsigned>(n)},
             kGatherThreads, 0, params, /*early=*/true);
}

void rotate_and_store(const Gpu& gpu, CUstream stream, const void* qkv, const RowMetadata& metadata,
                      const Angles& angles, const KvLayer& layer, int n, void* q) {
  QVL_REQUIRE(layer.head_dim % 2 == 0 && layer.head_dim <= kMaxHeadDim, QVL_UNSUPPORTED,
              "rotation of queries and keys: head_dim is %d; it must be an even number up to %d",
              layer.head_dim, kMaxHeadDim);
  RotateParams params{};
  params.qkv = qkv;
  params.q = q;
  params.positions = metadata.positions;
  params.angle_tables = metadata.angle_tables;
  params.tables = metadata.tables;
  params.blocks = metadata.blocks;
  params.max_blocks = metadata.max_blocks;
  params.cos = angles.cos;
  params.sin = angles.sin;
  params.query_scale = angles.query_scale;
  params.max_positions = angles.max_positions;
  params.cache = layer.base;
  params.block_bytes = layer.block_bytes;
  params.block_tokens = layer.block_tokens;
  params.n = n;
  params.heads = layer.heads;
  params.head_dim = layer.head_dim;
  params.type = cache_type(layer.dtype);
  const bool is_128 = layer.head_dim == 128;
  const char* name = is_128                    ? "rotate_and_store_dim128"
                     : layer.head_dim % 4 == 0 ? "rotate_and_store_run2"
                                               : "rotate_and_store_run1";
  const int64_t threads = int64_t{n} * layer.heads * (is_128 ? 16 : 32);  // lanes per head: HeadPart::kLanes
  gpu.launch(stream, name, {static_cast<unsigned>((threads + kRotateThreads - 1) / kRotateThreads)},
             kRotateThreads, 0, params, /*early=*/true);
}

}  // namespace qvl::cuda
