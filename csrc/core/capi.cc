// The C interface: checks pointers and sizes, converts structs, turns exceptions into status codes.
#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "core/checks.h"
#include "core/config.h"
#include "core/engine.h"
#include "core/error.h"
#include "core/pack.h"
#include "core/structs.h"

namespace qvl {
namespace {

#define QVL_STRING_(x) #x
#define QVL_STRING(x) QVL_STRING_(x)
constexpr char kVersion[] = QVL_STRING(QVL_VERSION_MAJOR) "." QVL_STRING(QVL_VERSION_MINOR);

void require_pointer(const void* pointer, const char* name) {
  QVL_REQUIRE(pointer != nullptr, QVL_INVALID, "%s is NULL", name);
}

void check_packing(qvl_dtype dtype, int64_t out, int64_t in, const void* values, const void* packed,
                   uint64_t bytes) {
  // QVL_INT32 is the type of column orders, which are not packed.
  const uint64_t needed = dtype == QVL_INT32 ? 0 : packed_bytes(dtype, out, in);
  QVL_REQUIRE(needed != 0, QVL_INVALID, "a [%lld, %lld] matrix of dtype %d cannot be stored",
              static_cast<long long>(out), static_cast<long long>(in), dtype);
  QVL_REQUIRE(bytes == needed, QVL_INVALID, "packed_bytes is %llu; it must be %llu",
              static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(needed));
  require_pointer(values, "values");
  require_pointer(packed, "packed");
}

// Type of the KV pool that qvl_generate creates: float32 for a float32 model, else bfloat16. The type of one
// matrix of the first layer stands for the model.
qvl_dtype cache_dtype(const qvl_config& config, const WeightTable& weights) {
  if (!has_language(config)) return QVL_FLOAT32;
  return weights.at("h.0.attn.c_attn.weight").dtype == QVL_FLOAT32 ? QVL_FLOAT32 : QVL_BFLOAT16;
}

std::unique_ptr<Backend> make_backend(const qvl_config& config, const WeightTable& weights) {
  return config.device == QVL_DEVICE_CUDA ? cuda_back_end().make(config, weights)
                                          : make_cpu_backend(config, weights);
}

// Check the pool and the number of blocks n. Returns false if n is 0: the call has nothing to do.
bool check_pool_call(const qvl_kv_pool* pool, int32_t n) {
  require_pointer(pool, "pool");
  QVL_REQUIRE(n >= 0, QVL_INVALID, "n is %d", n);
  return n > 0;
}

// Check that `bytes` is the size of n blocks and that `host` is not NULL. Returns the bytes per block.
uint64_t checked_block_bytes(const KvPool& pool, int32_t n, const void* host, uint64_t bytes) {
  require_pointer(host, "host");
  const uint64_t block = pool.block_bytes();
  QVL_REQUIRE(bytes / block == static_cast<uint64_t>(n) && bytes % block == 0, QVL_INVALID,
              "bytes is %llu; %d blocks have %llu each", static_cast<unsigned long long>(bytes), n,
              static_cast<unsigned long long>(block));
  return block;
}

// Values that qvl_sampling_init sets: top_p and repetition_penalty are 1, all other fields but `size` 0.
constexpr qvl_sampling kGreedy = {sizeof(qvl_sampling), 0, 1, 0, 1, 0, 0, 0, nullptr, 0, 0};

// qvl_alloc or qvl_host_alloc, with the back end's function `alloc`.
qvl_status allocate(qvl_engine* engine, uint64_t bytes, void** memory, void* (Backend::*alloc)(uint64_t),
                    qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    require_pointer(memory, "memory");
    *memory = nullptr;
    QVL_REQUIRE(bytes <= PTRDIFF_MAX, QVL_NO_MEMORY, "out of memory");
    *memory = (engine->backend.get()->*alloc)(bytes);
  });
}

// qvl_copy or qvl_copy_async, with the back end's function `copy`.
qvl_status copy_memory(qvl_engine* engine, void* to, const void* from, uint64_t bytes, qvl_stream stream,
                       void (Backend::*copy)(void*, const void*, uint64_t, qvl_stream), qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    if (bytes == 0) return;
    require_pointer(to, "to");
    require_pointer(from, "from");
    (engine->backend.get()->*copy)(to, from, bytes, stream);
  });
}

}  // namespace
}  // namespace qvl

using qvl::allocate;
using qvl::copy_memory;
using qvl::guarded;
using qvl::require_pointer;

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
    QVL_REQUIRE(!qvl::has_zeros(dtype), QVL_INVALID, "dtype %d: use qvl_pack_groups", dtype);
    qvl::pack(dtype, out, in, values, packed);
  });
}

qvl_status qvl_pack_groups(qvl_dtype dtype, int64_t out, int64_t in, const uint8_t* integers,
                           const uint16_t* scales, const uint16_t* zeros, void* packed, uint64_t packed_bytes,
                           qvl_error* error) {
  return guarded(error, [&] {
    QVL_REQUIRE(qvl::has_zeros(dtype), QVL_INVALID, "dtype %d has no groups with zero points", dtype);
    require_pointer(integers, "integers");
    qvl::check_packing(dtype, out, in, integers, packed, packed_bytes);
    require_pointer(scales, "scales");
    require_pointer(zeros, "zeros");
    qvl::pack_groups(dtype, out, in, integers, scales, zeros, packed);
  });
}

qvl_status qvl_unpack(qvl_dtype dtype, int64_t out, int64_t in, const void* packed, uint64_t packed_bytes,
                      float* values, qvl_error* error) {
  return guarded(error, [&] {
    qvl::check_packing(dtype, out, in, values, packed, packed_bytes);
    qvl::unpack(dtype, out, in, packed, values);
  });
}

int32_t qvl_device_count(qvl_device device) {
  int32_t count = device == QVL_DEVICE_CPU;
  if (device == QVL_DEVICE_CUDA) guarded(nullptr, [&] { count = qvl::cuda_back_end().count(); });
  return count;
}

qvl_status qvl_get_device_info(qvl_device device, int32_t index, qvl_device_info* info, qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(info, "info");
    const uint32_t size = info->size;
    qvl::check_size<qvl_device_info>("info", "size", size);
    // Load the back end first: its error is more specific than a count of 0.
    const int32_t count = device == QVL_DEVICE_CUDA ? qvl::cuda_back_end().count() : qvl_device_count(device);
    QVL_REQUIRE(index >= 0 && index < count, QVL_INVALID,
                "device %d, index %d: %d devices of this kind are available", device, index, count);
    qvl_device_info current{};
    if (device == QVL_DEVICE_CUDA) {
      qvl::cuda_back_end().describe(index, &current);
    } else {
      qvl::describe_cpu(&current);
    }
    current.size = size;
    std::memset(info, 0, size);  // also the fields of a newer version
    std::memcpy(info, &current, std::min<size_t>(size, sizeof current));
  });
}

qvl_status qvl_weights_create(const qvl_tensor* tensors, int64_t n_tensors, uint32_t tensor_size,
                              qvl_weights** weights, qvl_error* error) {
  if (weights != nullptr) *weights = nullptr;
  return guarded(error, [&] {
    require_pointer(weights, "weights");
    QVL_REQUIRE(n_tensors >= 0 && n_tensors <= (1 << 20), QVL_INVALID, "n_tensors is %lld",
                static_cast<long long>(n_tensors));
    QVL_REQUIRE(tensors != nullptr || n_tensors == 0, QVL_INVALID, "tensors is NULL");
    const qvl::ConvertedArray<qvl_tensor> given("tensors", "tensor_size", tensors, n_tensors, tensor_size);
    auto named = std::make_shared<qvl::Tensors>();
    for (int64_t i = 0; i < n_tensors; ++i) {
      const char* name = given.data()[i].name;
      QVL_REQUIRE(name != nullptr, QVL_INVALID, "tensors[%lld]: name is NULL", static_cast<long long>(i));
      named->add(given.data()[i], name);
    }
    *weights = new qvl_weights{std::move(named)};
  });
}

qvl_status qvl_weights_open(const char* path, qvl_weights** weights, qvl_error* error) {
  if (weights != nullptr) *weights = nullptr;
  return guarded(error, [&] {
    require_pointer(path, "path");
    require_pointer(weights, "weights");
    *weights = new qvl_weights{qvl::map_params_file(path)};
  });
}

int64_t qvl_weights_count(const qvl_weights* weights) {
  return weights != nullptr ? static_cast<int64_t>(weights->tensors->list().size()) : 0;
}

qvl_status qvl_weights_get(const qvl_weights* weights, int64_t i, qvl_tensor* tensor, uint32_t tensor_size,
                           qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(weights, "weights");
    require_pointer(tensor, "tensor");
    qvl::check_size<qvl_tensor>("tensor", "tensor_size", tensor_size);
    const std::vector<qvl_tensor>& list = weights->tensors->list();
    QVL_REQUIRE(i >= 0 && i < static_cast<int64_t>(list.size()), QVL_INVALID,
                "i is %lld; there are %zu weights", static_cast<long long>(i), list.size());
    const qvl_tensor& found = list[static_cast<size_t>(i)];
    std::memset(tensor, 0, tensor_size);
    std::memcpy(tensor, &found, std::min<size_t>(tensor_size, sizeof found));
  });
}

void qvl_weights_free(qvl_weights* weights) {
  delete weights;
}

qvl_status qvl_engine_create(const qvl_config* config, qvl_weights* weights, qvl_engine** engine,
                             qvl_error* error) {
  if (engine != nullptr) *engine = nullptr;
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    auto created = std::make_unique<qvl_engine>();
    created->config = qvl::checked_config(config);
    require_pointer(weights, "weights");
    created->tensors = weights->tensors;
    const qvl::WeightTable table = qvl::checked_weights(created->config, *created->tensors);
    created->cache_dtype = qvl::cache_dtype(created->config, table);
    created->backend = qvl::make_backend(created->config, table);
    *engine = created.release();
  });
}

void qvl_engine_free(qvl_engine* engine) {
  delete engine;
}

qvl_status qvl_adapter_create(qvl_engine* engine, const qvl_adapter_matrix* matrices, int64_t n_matrices,
                              uint32_t matrix_size, qvl_adapter** adapter, qvl_error* error) {
  if (adapter != nullptr) *adapter = nullptr;
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    require_pointer(adapter, "adapter");
    require_pointer(matrices, "matrices");
    QVL_REQUIRE(n_matrices >= 1 && n_matrices <= (1 << 20), QVL_INVALID, "n_matrices is %lld",
                static_cast<long long>(n_matrices));
    const qvl::ConvertedArray<qvl_adapter_matrix> given("matrices", "matrix_size", matrices, n_matrices,
                                                        matrix_size);
    *adapter = qvl::make_adapter(*engine, given.data(), n_matrices).release();
  });
}

void qvl_adapter_free(qvl_adapter* adapter) {
  delete adapter;
}

const char* qvl_engine_describe(const qvl_engine* engine) {
  return engine != nullptr ? engine->backend->describe() : "";
}

qvl_status qvl_alloc(qvl_engine* engine, uint64_t bytes, void** memory, qvl_error* error) {
  return allocate(engine, bytes, memory, &qvl::Backend::alloc, error);
}

void qvl_dealloc(qvl_engine* engine, void* memory) {
  if (engine != nullptr && memory != nullptr) engine->backend->dealloc(memory);
}

qvl_status qvl_copy(qvl_engine* engine, void* to, const void* from, uint64_t bytes, qvl_stream stream,
                    qvl_error* error) {
  return copy_memory(engine, to, from, bytes, stream, &qvl::Backend::copy, error);
}

qvl_status qvl_host_alloc(qvl_engine* engine, uint64_t bytes, void** memory, qvl_error* error) {
  return allocate(engine, bytes, memory, &qvl::Backend::alloc_host, error);
}

void qvl_host_free(qvl_engine* engine, void* memory) {
  if (engine != nullptr && memory != nullptr) engine->backend->dealloc_host(memory);
}

qvl_status qvl_copy_async(qvl_engine* engine, void* to, const void* from, uint64_t bytes, qvl_stream stream,
                          qvl_error* error) {
  return copy_memory(engine, to, from, bytes, stream, &qvl::Backend::copy_async, error);
}

qvl_status qvl_event_create(qvl_engine* engine, qvl_event** event, qvl_error* error) {
  if (event != nullptr) *event = nullptr;
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    require_pointer(event, "event");
    *event = new qvl_event{engine->backend->make_event()};
  });
}

qvl_status qvl_event_record(qvl_event* event, qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(event, "event");
    event->device_event->record(stream);
  });
}

qvl_status qvl_event_query(qvl_event* event, int32_t* done, qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(event, "event");
    require_pointer(done, "done");
    *done = event->device_event->done();
  });
}

qvl_status qvl_event_wait(qvl_event* event, qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(event, "event");
    event->device_event->wait();
  });
}

void qvl_event_free(qvl_event* event) {
  delete event;
}

qvl_status qvl_synchronize(qvl_engine* engine, qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    engine->backend->synchronize(stream);
  });
}

qvl_status qvl_encode_images(qvl_engine* engine, int64_t n, const float* images, float* features,
                             qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    QVL_REQUIRE(qvl::has_vision(engine->config), QVL_INVALID, "the engine has no vision stage");
    QVL_REQUIRE(n >= 0 && n <= (1 << 20), QVL_INVALID, "n is %lld", static_cast<long long>(n));
    if (n == 0) return;
    require_pointer(images, "images");
    require_pointer(features, "features");
    // The other calls that compute take the lock in core/engine.cc.
    const std::lock_guard<std::mutex> lock(engine->compute_lock);
    engine->backend->encode_images(n, images, features, stream);
  });
}

qvl_status qvl_kv_pool_create(qvl_engine* engine, int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype,
                              qvl_kv_pool** pool, qvl_error* error) {
  if (pool != nullptr) *pool = nullptr;
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    require_pointer(pool, "pool");
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
  const uint64_t block = qvl::kv_block_bytes(c, block_tokens, dtype),
                 blocks = static_cast<uint64_t>(n_blocks);
  return block <= PTRDIFF_MAX / blocks ? block * blocks : 0;
}

qvl_status qvl_kv_copy_blocks(qvl_kv_pool* pool, int32_t n, const int32_t* from, const int32_t* to,
                              qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    if (!qvl::check_pool_call(pool, n)) return;
    qvl::check_blocks(*pool->blocks, "from", n, from);
    qvl::check_blocks(*pool->blocks, "to", n, to);
    for (int32_t i = 0; i < n; ++i) {
      if (from[i] != to[i]) pool->blocks->copy_block(from[i], to[i], stream);
    }
  });
}

qvl_status qvl_kv_read_blocks(qvl_kv_pool* pool, int32_t n, const int32_t* blocks, void* host, uint64_t bytes,
                              qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    if (!qvl::check_pool_call(pool, n)) return;
    qvl::check_blocks(*pool->blocks, "blocks", n, blocks);
    const uint64_t block_bytes = qvl::checked_block_bytes(*pool->blocks, n, host, bytes);
    auto* to = static_cast<char*>(host);
    for (int32_t i = 0; i < n; ++i, to += block_bytes) pool->blocks->read_block(blocks[i], to, stream);
  });
}

qvl_status qvl_kv_write_blocks(qvl_kv_pool* pool, int32_t n, const int32_t* blocks, const void* host,
                               uint64_t bytes, qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    if (!qvl::check_pool_call(pool, n)) return;
    qvl::check_blocks(*pool->blocks, "blocks", n, blocks);
    const uint64_t block_bytes = qvl::checked_block_bytes(*pool->blocks, n, host, bytes);
    const auto* from = static_cast<const char*>(host);
    for (int32_t i = 0; i < n; ++i, from += block_bytes) pool->blocks->write_block(blocks[i], from, stream);
  });
}

qvl_status qvl_forward(qvl_engine* engine, qvl_kv_pool* pool, const qvl_batch* batch, float* logits,
                       qvl_stream stream, qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    require_pointer(pool, "pool");
    const qvl::ConvertedBatch converted(batch);
    qvl::forward(*engine, *pool, converted.get(), logits, stream);
  });
}

void qvl_sampling_init(qvl_sampling* sampling) {
  if (sampling == nullptr || sampling->size > qvl::kMaxStructSize)
    return;  // the call that uses the struct reports the error
  const uint32_t size = sampling->size;
  qvl_sampling defaults = qvl::kGreedy;
  defaults.size = size;
  std::memset(sampling, 0, size);
  std::memcpy(sampling, &defaults, std::min<size_t>(size, sizeof defaults));
}

qvl_status qvl_sample(qvl_engine* engine, int32_t n, const float* logits, const qvl_sampling* sampling,
                      uint32_t sampling_size, int32_t* const* counts, int32_t* tokens, qvl_stream stream,
                      qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    const qvl::ConvertedArray<qvl_sampling> rows("sampling", "sampling_size", sampling, n, sampling_size);
    qvl::SampleCall sample_call{};
    sample_call.n = n;
    sample_call.sampling = rows.data();
    sample_call.counts = counts;
    sample_call.tokens = tokens;
    qvl::sample(*engine, logits, sample_call, stream);
  });
}

qvl_status qvl_step(qvl_engine* engine, qvl_kv_pool* pool, const qvl_step_args* args, qvl_stream stream,
                    qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    require_pointer(pool, "pool");
    const qvl_step_args a = qvl::converted("args", args);
    const qvl::ConvertedBatch batch(a.batch);
    const qvl::ConvertedArray<qvl_sampling> rows("sampling", "sampling_size", a.sampling, a.rows,
                                                 a.sampling_size);
    const qvl::SampleCall sample_call{a.rows,     rows.data(),  a.counts,     a.tokens,
                                      a.logprobs, a.n_logprobs, a.top_tokens, a.top_logprobs};
    qvl::step(*engine, *pool, batch.get(), a.logits, sample_call, stream);
  });
}

qvl_status qvl_generate(qvl_engine* engine, qvl_kv_pool* pool, int32_t n, const qvl_request* requests,
                        uint32_t request_size, int32_t n_end, const int32_t* end_ids, qvl_on_step on_step,
                        void* user, int64_t stride, int32_t* tokens, qvl_result* results, qvl_stream stream,
                        qvl_error* error) {
  return guarded(error, [&] {
    require_pointer(engine, "engine");
    QVL_REQUIRE(n >= 1 && n <= (1 << 16), QVL_INVALID, "n is %d; it must be 1 to %d", n, 1 << 16);
    require_pointer(requests, "requests");
    const qvl::ConvertedArray<qvl_request> given("requests", "request_size", requests, n, request_size);
    std::deque<qvl::ConvertedArray<qvl_span>> spans;  // a deque, since these arrays cannot be moved
    std::vector<qvl::Request> converted;
    for (int32_t i = 0; i < n; ++i) {
      const qvl_request& r = given.data()[i];
      QVL_REQUIRE(r.n_spans <= (1 << 20) && r.reserved == 0, QVL_INVALID,
                  "requests[%d]: n_spans is %d and reserved is %u; at most %d, and 0", i, r.n_spans,
                  r.reserved, 1 << 20);
      spans.emplace_back("requests", "span_size", r.spans, r.n_spans,
                         r.span_size ? r.span_size : qvl::kFirstSize<qvl_span>);
      converted.push_back({r.n_tokens, r.tokens, r.n_spans, spans.back().data(), r.max_new, r.min_new,
                           r.sampling ? qvl::converted("sampling", r.sampling) : qvl::kGreedy, r.adapter});
    }
    qvl::generate(
        *engine, {pool, n, converted.data(), n_end, end_ids, on_step, user, stride, tokens, results, stream});
  });
}

}  // extern "C"
