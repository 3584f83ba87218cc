// The C boundary: NULLs and sizes are checked, errors become codes, the rest is elsewhere.
#include <cstring>

#include "core/checks.h"
#include "core/config.h"
#include "core/engine.h"
#include "core/error.h"
#include "core/pack.h"

namespace qvl {
namespace {

#define QVL_STRING_(x) #x
#define QVL_STRING(x) QVL_STRING_(x)
constexpr char kVersion[] = QVL_STRING(QVL_VERSION_MAJOR) "." QVL_STRING(QVL_VERSION_MINOR);

void not_null(const void* pointer, const char* name) {
  QVL_REQUIRE(pointer != nullptr, QVL_INVALID, "%s is NULL", name);
}

void check_packing(qvl_dtype dtype, int64_t out, int64_t in, const void* values, const void* packed,
                   uint64_t bytes) {
  const uint64_t needed = packed_bytes(dtype, out, in);
  QVL_REQUIRE(needed != 0, QVL_INVALID, "a [%lld, %lld] matrix of dtype %d cannot be stored",
              static_cast<long long>(out), static_cast<long long>(in), dtype);
  QVL_REQUIRE(bytes == needed, QVL_INVALID, "packed_bytes is %llu; it must be %llu",
              static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(needed));
  not_null(values, "values");
  not_null(packed, "packed");
}

// Keys and values of a float32 model are kept in float32, of any other in bfloat16.
qvl_dtype cache_dtype(const qvl_config& config, const WeightTable& weights) {
  if (!has_language(config)) return QVL_FLOAT32;
  return weights.at("h.0.attn.c_attn.weight").dtype == QVL_FLOAT32 ? QVL_FLOAT32 : QVL_BFLOAT16;
}

std::unique_ptr<Backend> make_backend(const qvl_config& config, const WeightTable& weights) {
  QVL_REQUIRE(config.device == QVL_DEVICE_CPU, QVL_UNSUPPORTED, "config: this build has no CUDA back end");
  return make_cpu_backend(config, weights);
}

}  // namespace

void forward(qvl_engine& engine, qvl_kv_pool& pool, const qvl_batch* batch, float* logits,
             qvl_stream stream) {
  QVL_REQUIRE(pool.engine == &engine, QVL_INVALID, "pool: belongs to another engine");
  check_batch(engine.config, *pool.blocks, batch);
  const std::lock_guard<std::mutex> lock(engine.computing);
  engine.backend->forward(*pool.blocks, *batch, logits, stream);
}

void sample(qvl_engine& engine, int32_t n, const float* logits, const qvl_sampling* sampling,
            int32_t* const* counts, int32_t* tokens, qvl_stream stream) {
  QVL_REQUIRE(has_language(engine.config), QVL_INVALID, "the engine has no language stage");
  QVL_REQUIRE(n >= 0, QVL_INVALID, "n is %d", n);
  if (n == 0) return;
  not_null(logits, "logits");
  not_null(sampling, "sampling");
  not_null(tokens, "tokens");
  char where[32];
  for (int32_t i = 0; i < n; ++i) {
    snprintf(where, sizeof where, "sampling[%d]", i);
    check_sampling(engine.config, where, sampling[i], counts != nullptr && counts[i] != nullptr);
  }
  const std::lock_guard<std::mutex> lock(engine.computing);
  engine.backend->sample(n, logits, sampling, counts, tokens, stream);
}

std::unique_ptr<qvl_kv_pool> make_pool(qvl_engine& engine, int32_t n_blocks, int32_t block_tokens,
                                       qvl_dtype dtype) {
  check_pool_sizes(engine.config, n_blocks, block_tokens, dtype);
  auto pool = std::make_unique<qvl_kv_pool>();
  pool->engine = &engine;
  pool->blocks = engine.backend->make_pool(n_blocks, block_tokens, dtype);
  return pool;
}

}  // namespace qvl

using qvl::guarded;
using qvl::not_null;

extern "C" {

const char* qvl_version(void) {
  return qvl::kVersion;
}

uint64_t qvl_packed_bytes(qvl_dtype dtype, int64_t out, int64_t in) {
  return qvl::packed_bytes(dtype, out, in);
}

qvl_status qvl_pack(qvl_dtype dtype, int64_t out, int64_t in, const float* values, void* packed,
                    uint64_t packed_bytes, qvl_error* error) {
  return guarded(error, [&] {
    qvl::check_packing(dtype, out, in, values, packed, packed_bytes);
    qvl::pack(dtype, out, in, values, packed);
  });
}

qvl_status qvl_unpack(qvl_dtype dtype, int64_t out, int64_t in, const void* packed, uint64_t packed_bytes,
                      float* values, qvl_error* error) {
  return guarded(error, [&] {
    qvl::check_packing(dtype, out, in, values, packed, packed_bytes);
    qvl::unpack(dtype, out, in, packed, values);
  });
}

qvl_status qvl_engine_create(const qvl_config* config, const qvl_tensor* tensors, int64_t n_tensors,
                             qvl_engine** engine, qvl_error* error) {
  if (engine != nullptr) *engine = nullptr;
  return guarded(error, [&] {
    not_null(engine, "engine");
    auto made = std::make_unique<qvl_engine>();
    made->config = qvl::checked_config(config);
    const qvl::WeightTable weights = qvl::checked_weights(made->config, tensors, n_tensors);
    made->cache_dtype = qvl::cache_dtype(made->config, weights);
    made->backend = qvl::make_backend(made->config, weights);
    *engine = made.release();
  });
}

void qvl_engine_free(qvl_engine* engine) {
  delete engine;
}

const char* qvl_engine_describe(const qvl_engine* engine) {
  return engine != nullptr ? engine->backend->describe() : "";
}

qvl_status qvl_alloc(qvl_engine* engine, uint64_t bytes, void** memory, qvl_error* error) {
  return guarded(error, [&] {
    not_null(engine, "engine");
    not_null(memory, "memory");
    *memory = nullptr;
    QVL_REQUIRE(bytes <= PTRDIFF_MAX, QVL_NO_MEMORY, "out of memory");
    *memory = engine->backend->alloc(bytes);
  });
}

void qvl_dealloc(qvl_engine* engine, void* memory) {
  if (engine != nullptr && memory != nullptr) engine->backend->dealloc(memory);
}

qvl_status qvl_copy(qvl_engine* engine, void* to, const void* from, uint64_t bytes, qvl_stream stream,
                    qvl_error* error) {
  return guarded(error, [&] {
    not_null(engine, "engine");
    if (bytes == 0) return;
    not_null(to, "to");
    not_null(from, "from");
    engine->backend->copy(to, from, bytes, stream);
  });
}

qvl_status qvl_synchronize(qvl_engine* engine, qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    not_null(engine, "engine");
    engine->backend->synchronize(stream);
  });
}

qvl_status qvl_encode_images(qvl_engine* engine, int64_t n, const float* images, float* features,
                             qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    not_null(engine, "engine");
    QVL_REQUIRE(qvl::has_vision(engine->config), QVL_INVALID, "the engine has no vision stage");
    QVL_REQUIRE(n >= 0 && n <= (1 << 20), QVL_INVALID, "n is %lld", static_cast<long long>(n));
    if (n == 0) return;
    not_null(images, "images");
    not_null(features, "features");
    const std::lock_guard<std::mutex> lock(engine->computing);
    engine->backend->encode_images(n, images, features, stream);
  });
}

qvl_status qvl_kv_pool_create(qvl_engine* engine, int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype,
                              qvl_kv_pool** pool, qvl_error* error) {
  if (pool != nullptr) *pool = nullptr;
  return guarded(error, [&] {
    not_null(engine, "engine");
    not_null(pool, "pool");
    *pool = qvl::make_pool(*engine, n_blocks, block_tokens, dtype).release();
  });
}

void qvl_kv_pool_free(qvl_kv_pool* pool) {
  delete pool;
}

uint64_t qvl_kv_pool_bytes(const qvl_engine* engine, int32_t n_blocks, int32_t block_tokens,
                           qvl_dtype dtype) {
  if (engine == nullptr) return 0;
  const qvl_config& c = engine->config;
  if (guarded(nullptr, [&] { qvl::check_pool_sizes(c, n_blocks, block_tokens, dtype); }) != QVL_OK) return 0;
  const uint64_t element = dtype == QVL_FLOAT32 ? 4 : dtype == QVL_INT8 ? 1 : 2;
  const uint64_t scale = dtype == QVL_INT8 ? 4 : 0, blocks = static_cast<uint64_t>(n_blocks);
  const uint64_t token =
      static_cast<uint64_t>(c.heads) * (static_cast<uint64_t>(c.head_dim) * element + scale);
  const uint64_t block = 2 * static_cast<uint64_t>(c.layers) * static_cast<uint64_t>(block_tokens) * token;
  return block <= PTRDIFF_MAX / blocks ? block * blocks : 0;
}

qvl_status qvl_forward(qvl_engine* engine, qvl_kv_pool* pool, const qvl_batch* batch, float* logits,
                       qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    not_null(engine, "engine");
    not_null(pool, "pool");
    qvl::forward(*engine, *pool, batch, logits, stream);
  });
}

qvl_sampling qvl_sampling_default(void) {
  qvl_sampling sampling = QVL_INIT(qvl_sampling);
  sampling.top_p = 1;
  sampling.repetition_penalty = 1;
  return sampling;
}

qvl_status qvl_sample(qvl_engine* engine, int32_t n, const float* logits, const qvl_sampling* sampling,
                      int32_t* const* counts, int32_t* tokens, qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    not_null(engine, "engine");
    qvl::sample(*engine, n, logits, sampling, counts, tokens, stream);
  });
}

qvl_status qvl_generate(qvl_engine* engine, qvl_kv_pool* pool, int32_t n, const qvl_request* requests,
                        int32_t n_end, const int32_t* end_ids, qvl_on_step on_step, void* user,
                        int64_t stride, int32_t* tokens, qvl_result* results, qvl_stream stream,
                        qvl_error* error) {
  return guarded(error, [&] {
    not_null(engine, "engine");
    qvl::generate(*engine,
                  {pool, n, requests, n_end, end_ids, on_step, user, stride, tokens, results, stream});
  });
}

}  // extern "C"
