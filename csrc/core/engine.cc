#include "core/engine.h"

#include "core/checks.h"
#include "core/config.h"
#include "core/error.h"
#include "core/sampling.h"

namespace qvl {
namespace {

void check_sample_call(const qvl_config& config, const SampleCall& call) {
  QVL_REQUIRE(has_language(config), QVL_INVALID, "the engine has no language stage");
  QVL_REQUIRE(call.n >= 0, QVL_INVALID, "n is %d", call.n);
  if (call.n == 0) return;
  QVL_REQUIRE(call.sampling != nullptr, QVL_INVALID, "sampling is NULL");
  QVL_REQUIRE(call.tokens != nullptr, QVL_INVALID, "tokens is NULL");
  QVL_REQUIRE(call.n_top >= 0 && call.n_top <= kMaxLogprobs && call.n_top <= config.vocab, QVL_INVALID,
              "n_logprobs is %d; it must be 0 to %d, and no more than the vocabulary", call.n_top,
              kMaxLogprobs);
  QVL_REQUIRE(call.n_top == 0 || (call.top_tokens != nullptr && call.top_logprobs != nullptr), QVL_INVALID,
              "n_logprobs is %d and top_tokens or top_logprobs is NULL", call.n_top);
  for (int32_t i = 0; i < call.n; ++i) {
    const bool counted = call.counts != nullptr && call.counts[i] != nullptr;
    check_sampling(config, "sampling", i, call.sampling[i], counted);
  }
}

void check_owners(const qvl_engine& engine, const qvl_kv_pool& pool, const qvl_batch& batch) {
  QVL_REQUIRE(pool.engine == &engine, QVL_INVALID, "pool: belongs to another engine");
  for (int32_t i = 0; i < batch.n_sequences; ++i) {
    const qvl_adapter* adapter = batch.sequences[i].adapter;
    QVL_REQUIRE(adapter == nullptr || adapter->engine == &engine, QVL_INVALID,
                "sequence %d: adapter: belongs to another engine", i);
  }
}

}  // namespace

void forward(qvl_engine& engine, qvl_kv_pool& pool, const qvl_batch& batch, float* logits,
             qvl_stream stream) {
  check_batch(engine.config, *pool.blocks, batch);
  check_owners(engine, pool, batch);
  const std::lock_guard<std::mutex> lock(engine.compute_lock);
  engine.backend->forward(*pool.blocks, batch, logits, stream);
}

void sample(qvl_engine& engine, const float* logits, const SampleCall& call, qvl_stream stream) {
  check_sample_call(engine.config, call);
  if (call.n == 0) return;
  QVL_REQUIRE(logits != nullptr, QVL_INVALID, "logits is NULL");
  const std::lock_guard<std::mutex> lock(engine.compute_lock);
  engine.backend->sample(logits, call, stream);
}

void step(qvl_engine& engine, qvl_kv_pool& pool, const qvl_batch& batch, float* logits,
          const SampleCall& call, qvl_stream stream) {
  check_batch(engine.config, *pool.blocks, batch);
  check_owners(engine, pool, batch);
  int32_t rows = 0;
  for (int32_t i = 0; i < batch.n_sequences; ++i) {
    rows += (batch.sequences[i].flags & QVL_SEQUENCE_NO_LOGITS) == 0;
  }
  QVL_REQUIRE(call.n == rows, QVL_INVALID,
              "rows is %d; the batch has %d sequences without QVL_SEQUENCE_NO_LOGITS", call.n, rows);
  check_sample_call(engine.config, call);
  const std::lock_guard<std::mutex> lock(engine.compute_lock);
  engine.backend->step(*pool.blocks, batch, logits, call, stream);
}

std::unique_ptr<qvl_adapter> make_adapter(qvl_engine& engine, const qvl_adapter_matrix* matrices, int64_t n) {
  const std::vector<AdapterMatrix> checked = checked_adapter(engine.config, matrices, n);
  // On a GPU a larger adapter replaces the scratch memory of the adapters.
  const std::lock_guard<std::mutex> lock(engine.compute_lock);
  return std::unique_ptr<qvl_adapter>(new qvl_adapter{&engine, engine.backend->make_adapter(checked)});
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
