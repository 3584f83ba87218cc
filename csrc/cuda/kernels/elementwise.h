// Parameters of the kernels in elementwise.cu, for host and device. Fields: see the functions in ops.h.
#pragma once

namespace qvl::cuda {

struct RmsNormParams {
  const float* x;
  const float* weight;
  void* y;
  int width;
  float epsilon;
};

constexpr int kEmbedThreads = 128;
constexpr int kEmbedValues = 8;  // per thread

struct EmbedParams {
  const void* wte;
  const int* ids;
  const unsigned long long* features;  // [n], or NULL: address of float32 [width]; 0: look up the id
  float* x;
  int vocab, width;
  int parts;  // blocks per row
};

constexpr int kGatherThreads = 256;

struct GatherParams {
  const void* x;
  const int* order;  // [in]
  void* y;
  long long x_stride, y_stride;
  int in;
};

constexpr int kRotateThreads = 128;
constexpr int kMaxHeadDim = 512;  // of these kernels; Language requires at most 256, for those of attention

enum CacheType { kCacheFloat32, kCacheBfloat16, kCacheFloat16, kCacheInt8 };

struct RotateParams {
  const void* qkv;
  void* q;
  const int* positions;
  const int* angle_tables;
  const int* tables;
  const int* blocks;
  const float* cos;
  const float* sin;
  const float* query_scale;
  char* cache;
  unsigned long long block_bytes;
  int max_blocks, max_positions, block_tokens;
  int n, heads, head_dim;
  int type;  // CacheType
};

}  // namespace qvl::cuda
