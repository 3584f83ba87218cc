// The handles behind the C interface.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "core/backend.h"

struct qvl_engine {
  qvl_config config;
  std::unique_ptr<qvl::Backend> backend;
  qvl_dtype cache_dtype;  // what qvl_generate makes its own pool of
  std::mutex computing;
};

struct qvl_kv_pool {
  qvl_engine* engine;
  std::unique_ptr<qvl::KvPool> blocks;
};

namespace qvl {

// The checked calls, taking the engine's lock.
void forward(qvl_engine& engine, qvl_kv_pool& pool, const qvl_batch* batch, float* logits, qvl_stream stream);
void sample(qvl_engine& engine, int32_t n, const float* logits, const qvl_sampling* sampling,
            int32_t* const* counts, int32_t* tokens, qvl_stream stream);
std::unique_ptr<qvl_kv_pool> make_pool(qvl_engine& engine, int32_t n_blocks, int32_t block_tokens,
                                       qvl_dtype dtype);

struct GenerateCall {
  qvl_kv_pool* pool;
  int32_t n;
  const qvl_request* requests;
  int32_t n_end;
  const int32_t* end_ids;
  qvl_on_step on_step;
  void* user;
  int64_t stride;
  int32_t* tokens;
  qvl_result* results;
  qvl_stream stream;
};

void generate(qvl_engine& engine, const GenerateCall& call);

}  // namespace qvl
