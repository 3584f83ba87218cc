// Checks of what callers pass to the computing functions.
#pragma once

#include "core/backend.h"

namespace qvl {

// Tokens in the batch. Fails if anything about it is wrong, ids aside.
int64_t check_batch(const qvl_config& config, const KvPool& pool, const qvl_batch* batch);

void check_spans(const char* where, int32_t n_spans, const qvl_span* spans, int64_t n_tokens);

void check_sampling(const qvl_config& config, const char* where, const qvl_sampling& sampling, bool counted);

void check_pool_sizes(const qvl_config& config, int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype);

}  // namespace qvl
