// Handles of the C interface, except qvl_adapter (core/backend.h); the functions with which core/capi.cc and
// core/generate.cc run steps and create adapters and pools; generate().
#pragma once

#include <memory>
#include <mutex>

#include "core/backend.h"

struct qvl_weights {
  std::shared_ptr<const qvl::Tensors> tensors;
};

struct qvl_engine {
  qvl_config config;
  std::shared_ptr<const qvl::Tensors> tensors;  // keeps mapped weights, which the back end reads, in memory
  std::unique_ptr<qvl::Backend> backend;
  qvl_dtype cache_dtype;    // type of the pool that qvl_generate creates
  std::mutex compute_lock;  // held by a call that computes or creates an adapter
};

struct qvl_kv_pool {
  qvl_engine* engine;
  std::unique_ptr<qvl::KvPool> blocks;
};

struct qvl_event {
  std::unique_ptr<qvl::Event> device_event;
};

namespace qvl {

// These functions check their arguments. All except make_pool() then take the engine's lock. Structs must be
// in the layout of this library's qwenvl.h (core/structs.h converts them).
void forward(qvl_engine& engine, qvl_kv_pool& pool, const qvl_batch& batch, float* logits, qvl_stream stream);
void sample(qvl_engine& engine, const float* logits, const SampleCall& call, qvl_stream stream);
void step(qvl_engine& engine, qvl_kv_pool& pool, const qvl_batch& batch, float* logits,
          const SampleCall& call, qvl_stream stream);
std::unique_ptr<qvl_adapter> make_adapter(qvl_engine& engine, const qvl_adapter_matrix* matrices, int64_t n);
std::unique_ptr<qvl_kv_pool> make_pool(qvl_engine& engine, int32_t n_blocks, int32_t block_tokens,
                                       qvl_dtype dtype);

// The fields of a qvl_request, converted: spans in the layout of this library's qwenvl.h, and a copy of the
// sampling parameters, greedy if the caller gave none.
struct Request {
  int32_t n_tokens;
  const int32_t* tokens;
  int32_t n_spans;
  const qvl_span* spans;
  int32_t max_new, min_new;
  qvl_sampling sampling;
  const qvl_adapter* adapter;
};

// Arguments of qvl_generate.
struct GenerateCall {
  qvl_kv_pool* pool;
  int32_t n;
  const Request* requests;
  int32_t n_end;
  const int32_t* end_ids;
  qvl_on_step on_step;
  void* user;
  int64_t stride;
  int32_t* tokens;
  qvl_result* results;
  qvl_stream stream;
};

// Calls step() repeatedly, so the lock is free between steps.
void generate(qvl_engine& engine, const GenerateCall& call);

}  // namespace qvl
