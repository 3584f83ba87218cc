#include "core/checks.h"

#include "core/config.h"
#include "core/error.h"
#include "core/sampling.h"
#include "core/structs.h"

namespace qvl {
namespace {

void check_sequence(const qvl_config& config, const KvPool& pool, int32_t index, const qvl_sequence& s) {
  QVL_REQUIRE(s.n_new >= 1, QVL_INVALID, "sequence %d: n_new is %d; it must be at least 1", index, s.n_new);
  QVL_REQUIRE(s.n_past >= 0, QVL_INVALID, "sequence %d: n_past is %d; it must be at least 0", index,
              s.n_past);
  const int64_t length = int64_t{s.n_past} + s.n_new;
  QVL_REQUIRE(length <= config.max_positions, QVL_INVALID, "sequence %d: %lld tokens; the model takes %d",
              index, static_cast<long long>(length), config.max_positions);
  QVL_REQUIRE(s.prompt_len >= 1 && s.prompt_len <= config.max_positions, QVL_INVALID,
              "sequence %d: prompt_len is %d; it must be 1 to %d", index, s.prompt_len, config.max_positions);
  QVL_REQUIRE(s.n_blocks >= 0 && int64_t{s.n_blocks} * pool.block_tokens >= length, QVL_INVALID,
              "sequence %d: %d blocks of %d tokens; it has %lld tokens", index, s.n_blocks, pool.block_tokens,
              static_cast<long long>(length));
  QVL_REQUIRE(s.blocks != nullptr, QVL_INVALID, "sequence %d: blocks is NULL", index);
  constexpr uint32_t kFlags = QVL_SEQUENCE_NO_LOGITS | QVL_SEQUENCE_GENERATED;
  QVL_REQUIRE((s.flags & ~kFlags) == 0 && s.reserved == 0, QVL_INVALID,
              "sequence %d: flags are %u and reserved is %u; they must be QVL_SEQUENCE_* and 0", index,
              s.flags, s.reserved);
  const int64_t used = (length + pool.block_tokens - 1) / pool.block_tokens;
  for (int64_t i = 0; i < used; ++i) {
    QVL_REQUIRE(s.blocks[i] >= 0 && s.blocks[i] < pool.n_blocks, QVL_INVALID,
                "sequence %d: blocks[%lld] is %d; the pool has %d", index, static_cast<long long>(i),
                s.blocks[i], pool.n_blocks);
  }
}

}  // namespace

void check_spans(const char* where, int32_t n_spans, const qvl_span* spans, int64_t n_tokens) {
  QVL_REQUIRE(n_spans >= 0, QVL_INVALID, "%s: n_spans is %d", where, n_spans);
  QVL_REQUIRE(n_spans == 0 || spans != nullptr, QVL_INVALID, "%s: spans is NULL", where);
  int64_t end = 0;
  for (int32_t i = 0; i < n_spans; ++i) {
    const qvl_span& span = spans[i];
    QVL_REQUIRE(span.count >= 1, QVL_INVALID, "%s: spans[%d]: count is %d; it must be at least 1", where, i,
                span.count);
    QVL_REQUIRE(span.start >= end, QVL_INVALID, "%s: spans[%d]: start is %d; the span before ends at %lld",
                where, i, span.start, static_cast<long long>(end));
    end = int64_t{span.start} + span.count;
    QVL_REQUIRE(end <= n_tokens, QVL_INVALID, "%s: spans[%d]: ends at %lld; there are %lld tokens", where, i,
                static_cast<long long>(end), static_cast<long long>(n_tokens));
    QVL_REQUIRE(span.features != nullptr, QVL_INVALID, "%s: spans[%d]: features is NULL", where, i);
  }
}

int64_t check_batch(const qvl_config& config, const KvPool& pool, const qvl_batch& batch) {
  QVL_REQUIRE(batch.n_sequences >= 1, QVL_INVALID, "batch: n_sequences is %d; it must be at least 1",
              batch.n_sequences);
  QVL_REQUIRE(batch.reserved == 0, QVL_INVALID, "batch: reserved is %d; it must be 0", batch.reserved);
  QVL_REQUIRE(batch.sequences != nullptr, QVL_INVALID, "batch: sequences is NULL");
  QVL_REQUIRE(batch.tokens != nullptr, QVL_INVALID, "batch: tokens is NULL");
  int64_t n_tokens = 0;
  for (int32_t i = 0; i < batch.n_sequences; ++i) {
    check_sequence(config, pool, i, batch.sequences[i]);
    n_tokens += batch.sequences[i].n_new;
  }
  check_spans("batch", batch.n_spans, batch.spans, n_tokens);
  return n_tokens;
}

void check_sampling(const qvl_config& config, const char* where, int32_t index, const qvl_sampling& s,
                    bool counted) {
  const auto in_range = [&](const char* name, float value, double minimum, double maximum) {
    const auto v = static_cast<double>(value);
    QVL_REQUIRE(v >= minimum && v <= maximum, QVL_INVALID, "%s[%d]: %s is %g; it must be %g to %g", where,
                index, name, v, minimum, maximum);
  };
  QVL_REQUIRE(s.size >= kFirstSize<qvl_sampling> && s.size <= kMaxStructSize, QVL_INVALID,
              "%s[%d]: size is %u; set it, then call qvl_sampling_init()", where, index, s.size);
  in_range("temperature", s.temperature, 0, 100);
  in_range("top_p", s.top_p, 0, 1);
  QVL_REQUIRE(s.top_k >= 0, QVL_INVALID, "%s[%d]: top_k is %d; it must be at least 0", where, index, s.top_k);
  in_range("repetition_penalty", s.repetition_penalty, 1e-6, 100);
  in_range("frequency_penalty", s.frequency_penalty, -100, 100);
  in_range("presence_penalty", s.presence_penalty, -100, 100);
  QVL_REQUIRE(counted || !penalised(s), QVL_INVALID, "%s[%d]: penalties need counts", where, index);
  QVL_REQUIRE(s.n_forbidden >= 0, QVL_INVALID, "%s[%d]: n_forbidden is %d", where, index, s.n_forbidden);
  QVL_REQUIRE(s.n_forbidden == 0 || s.forbidden != nullptr, QVL_INVALID, "%s[%d]: forbidden is NULL", where,
              index);
  for (int32_t i = 0; i < s.n_forbidden; ++i) {
    QVL_REQUIRE(s.forbidden[i] >= 0 && s.forbidden[i] < config.vocab, QVL_INVALID,
                "%s[%d]: forbidden[%d] is %d; the vocabulary has %d", where, index, i, s.forbidden[i],
                config.vocab);
  }
}

void check_blocks(const KvPool& pool, const char* name, int32_t n, const int32_t* blocks) {
  QVL_REQUIRE(blocks != nullptr, QVL_INVALID, "%s is NULL", name);
  for (int32_t i = 0; i < n; ++i) {
    QVL_REQUIRE(blocks[i] >= 0 && blocks[i] < pool.n_blocks, QVL_INVALID,
                "%s[%d] is %d; the pool has %d blocks", name, i, blocks[i], pool.n_blocks);
  }
}

void check_pool_sizes(const qvl_config& config, int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype) {
  QVL_REQUIRE(has_language(config), QVL_INVALID, "pool: the engine has no language stage");
  QVL_REQUIRE(n_blocks >= 1, QVL_INVALID, "pool: n_blocks is %d; it must be at least 1", n_blocks);
  QVL_REQUIRE(block_tokens >= 1 && block_tokens <= kMaxBlockTokens, QVL_INVALID,
              "pool: block_tokens is %d; it must be 1 to %d", block_tokens, kMaxBlockTokens);
  QVL_REQUIRE(dtype == QVL_FLOAT32 || dtype == QVL_BFLOAT16 || dtype == QVL_FLOAT16 || dtype == QVL_INT8,
              QVL_INVALID, "pool: dtype is %d; it must be QVL_FLOAT32, QVL_BFLOAT16, QVL_FLOAT16 or QVL_INT8",
              dtype);
}

}  // namespace qvl
