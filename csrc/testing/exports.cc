// C interface to single kernels and helpers (qvlt_) and to references of the kernels (qvlr_), for tests/csrc.
// Part of libqwenvl_testing.so only. Functions with an ISA argument return 0, or 1 on failure, such as an ISA
// that this processor does not support.
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "core/pack.h"
#include "core/rotary.h"
#include "cpu/attention.h"
#include "cpu/control_groups.h"
#include "cpu/dispatch.h"
#include "cpu/kv_pool.h"
#include "cpu/linear.h"
#include "reference/reference.h"

using namespace qvl;
using namespace qvl::cpu;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <typename Body>
int with_context(qvl_isa isa, int threads, Body&& body) {
  return guarded(nullptr,
                 [&] {
                   Context context(kernels_for(isa), threads);
                   body(context);
                 }) == QVL_OK
             ? 0
             : 1;
}

}  // namespace

// Linear layer on n_x activations: the first n_prompt by the blocked product, the others by the matrix-vector
// kernels. order: stored column j multiplies input order[j]; NULL: input j.
EXPORT int qvlt_linear(qvl_isa isa, int threads, qvl_dtype dtype, int64_t n_prompt, int64_t n_x, int64_t rows,
                       int64_t k, const float* x, const void* packed, const int32_t* order, const float* bias,
                       int add, float* y) {
  return with_context(isa, threads, [&](Context& context) {
    Matrix matrix = Matrix::stored(dtype, rows, k, packed, bias);
    matrix.order = order;
    linear(context, matrix, x, k, {n_prompt, n_x - n_prompt}, y, rows, add != 0);
  });
}

EXPORT int qvlt_rms_norm(qvl_isa isa, int64_t n, int64_t width, const float* x, const float* weight,
                         float epsilon, float* y) {
  return with_context(isa, 1, [&](Context& context) {
    for (int64_t i = 0; i < n; ++i) {
      context.kernels.rms_norm(x + i * width, weight, static_cast<int>(width), epsilon, y + i * width);
    }
  });
}

EXPORT int qvlt_layer_norm(qvl_isa isa, int64_t n, int64_t width, const float* x, const float* weight,
                           const float* bias, float epsilon, float* y) {
  return with_context(isa, 1, [&](Context& context) {
    for (int64_t i = 0; i < n; ++i) {
      context.kernels.layer_norm(x + i * width, weight, bias, static_cast<int>(width), epsilon,
                                 y + i * width);
    }
  });
}

EXPORT int qvlt_gelu(qvl_isa isa, int64_t n, float* x) {
  return with_context(isa, 1, [&](Context& context) { context.kernels.gelu(x, n); });
}

EXPORT int qvlt_silu_mul(qvl_isa isa, int64_t n, const float* gate, float* x) {
  return with_context(isa, 1, [&](Context& context) { context.kernels.silu_mul(gate, x, n); });
}

EXPORT int qvlt_add(qvl_isa isa, int64_t n, const float* from, float* to) {
  return with_context(isa, 1, [&](Context& context) { context.kernels.add(from, to, n); });
}

EXPORT int qvlt_bfloat16(qvl_isa isa, int64_t n, const float* from, uint16_t* bits, float* back) {
  return with_context(isa, 1, [&](Context& context) {
    context.kernels.narrow(from, bits, n);
    context.kernels.widen(bits, back, n);
  });
}

// Rotate and scale x [n, head_dim] in place. frequencies [head_dim / 2] is an output, for qvlr_rotary.
EXPORT int qvlt_rotary(qvl_isa isa, const qvl_config* config, int prompt_len, int64_t n,
                       const int32_t* positions, const float* scale, float* frequencies, float* x) {
  return with_context(isa, 1, [&](Context& context) {
    const auto half = static_cast<size_t>(config->head_dim / 2);
    std::vector<float> cos(half), sin(half);
    rotary_frequencies(*config, prompt_len, frequencies);
    for (int64_t i = 0; i < n; ++i) {
      rotary_row(*config, frequencies, positions[i], cos.data(), sin.data());
      context.kernels.rotate(x + i * config->head_dim, cos.data(), sin.data(), config->head_dim, scale[i]);
    }
  });
}

EXPORT float qvlt_query_scale(const qvl_config* config, int position) {
  return query_scale(*config, position);
}

EXPORT double qvlt_cpu_quota(const char* cgroup_file, const char* root) {
  return cpu_quota(cgroup_file, root);
}

EXPORT void qvlt_memory_limit(const char* cgroup_file, const char* root, uint64_t* total, uint64_t* free) {
  const MemoryLimit limit = memory_limit(cgroup_file, root);
  *total = limit.total;
  *free = limit.free;
}

// Write all blocks of a pool from `data`, copy block `from` to block `to`, and read all blocks into `out`.
// Return the bytes per block.
EXPORT int64_t qvlt_pool_blocks(qvl_dtype dtype, int layers, int heads, int head_dim, int n_blocks,
                                int block_tokens, const char* data, int from, int to, char* out) {
  qvl_config config{};
  config.layers = layers;
  config.heads = heads;
  config.head_dim = head_dim;
  CpuKvPool pool(config, n_blocks, block_tokens, dtype);
  const uint64_t bytes = pool.block_bytes();
  for (int i = 0; i < n_blocks; ++i) pool.write_block(i, data + static_cast<uint64_t>(i) * bytes, nullptr);
  pool.copy_block(from, to, nullptr);
  for (int i = 0; i < n_blocks; ++i) pool.read_block(i, out + static_cast<uint64_t>(i) * bytes, nullptr);
  return static_cast<int64_t>(bytes);
}

// Attention with q, k, v and `causal` as in reference.h. Keys and values are in a pool of type `dtype` with
// blocks of `tile` tokens. decode, only with causal: compute each query separately, as in a decode step.
// rounded: compute in bfloat16 if the ISA can, except with decode.
EXPORT int qvlt_attention(qvl_isa isa, int threads, qvl_dtype dtype, int tile, int rounded, int decode,
                          int64_t heads, int64_t head_dim, int64_t n, int64_t n_keys, int causal,
                          const float* q, const float* k, const float* v, float* out) {
  struct Kv final : KeysAndValues {
    const CpuKvPool& pool;
    explicit Kv(const CpuKvPool& pool) : pool(pool) { tile_tokens = pool.block_tokens; }
    KvTile tile(const Queries& queries, int head, int64_t i) const override {
      const auto count = std::min<int64_t>(tile_tokens, queries.n_keys - i * tile_tokens);
      return pool.tile(0, static_cast<int>(i), head, static_cast<int>(count));
    }
  };
  return with_context(isa, threads, [&](Context& context) {
    const int64_t stride = heads * head_dim;
    qvl_config config{};
    config.layers = 1;
    config.heads = static_cast<int32_t>(heads);
    config.head_dim = static_cast<int32_t>(head_dim);
    CpuKvPool pool(config, static_cast<int32_t>((n_keys + tile - 1) / tile), tile, dtype);
    for (int t = 0; t < n_keys; ++t) {
      pool.write(context.kernels, /*layer=*/0, t / tile, t % tile, /*part=*/0, k + t * stride);
      pool.write(context.kernels, /*layer=*/0, t / tile, t % tile, /*part=*/1, v + t * stride);
    }
    const Mask mask = decode != 0 ? kDecode : causal != 0 ? kCausal : kAllKeys;
    std::vector<Queries> work;
    for (int64_t first = 0; first < n; first += kQueryTile) {
      const auto count = static_cast<int>(std::min<int64_t>(kQueryTile, n - first));
      work.push_back({first, count, causal != 0 ? n_keys - n + first + count : n_keys, mask});
    }
    const AttentionShape shape{
        static_cast<int>(heads), static_cast<int>(head_dim), stride, head_dim, stride, rounded != 0};
    attention(context, shape, q, Kv(pool), work.data(), static_cast<int64_t>(work.size()), out);
  });
}

EXPORT void qvlr_linear(int64_t n_x, int64_t rows, int64_t k, const float* x, const float* weights,
                        const float* bias, int add, float* y) {
  reference::linear(n_x, rows, k, x, weights, bias, add != 0, y);
}
EXPORT void qvlr_rms_norm(int64_t n, int64_t width, const float* x, const float* weight, float epsilon,
                          float* y) {
  reference::rms_norm(n, width, x, weight, static_cast<double>(epsilon), y);
}
EXPORT void qvlr_layer_norm(int64_t n, int64_t width, const float* x, const float* weight, const float* bias,
                            float epsilon, float* y) {
  reference::layer_norm(n, width, x, weight, bias, static_cast<double>(epsilon), y);
}
EXPORT void qvlr_gelu(int64_t n, float* x) {
  reference::gelu(n, x);
}
EXPORT void qvlr_silu_mul(int64_t n, const float* gate, float* x) {
  reference::silu_mul(n, gate, x);
}
EXPORT void qvlr_rotary(int64_t n, int64_t head_dim, const int32_t* positions, const float* frequencies,
                        const float* scale, float* x) {
  reference::rotary(n, head_dim, positions, frequencies, scale, x);
}
EXPORT void qvlr_attention(int64_t heads, int64_t head_dim, int64_t n, int64_t n_keys, int causal,
                           const float* q, const float* k, const float* v, float* out) {
  reference::attention(heads, head_dim, n, n_keys, causal != 0, q, k, v, out);
}
