// Checks of batches, spans, sampling parameters and pools. They throw an Error with QVL_INVALID.
#pragma once

#include "core/backend.h"

namespace qvl {

// Check a batch, but not its token ids, which may be in device memory: a back end calls check_ids()
// (core/passes.h) if they are in ordinary host memory. Returns the number of tokens.
int64_t check_batch(const qvl_config& config, const KvPool& pool, const qvl_batch& batch);

// Check the image spans of n_tokens tokens. `where`: beginning of the error message.
void check_spans(const char* where, int32_t n_spans, const qvl_span* spans, int64_t n_tokens);

// Check the sampling parameters of a row. The error message begins with where[index]. counted: whether the
// row has token counts, which penalties need.
void check_sampling(const qvl_config& config, const char* where, int32_t index, const qvl_sampling& sampling,
                    bool counted);

// Check that block indices are within the pool.
void check_blocks(const KvPool& pool, const char* name, int32_t n, const int32_t* blocks);

// Check that the engine has a language stage, and the arguments of qvl_kv_pool_create().
void check_pool_sizes(const qvl_config& config, int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype);

}  // namespace qvl
