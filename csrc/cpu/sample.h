// Sampling of a token from a row of logits.
#pragma once

#include "cpu/memory.h"
#include "qwenvl.h"

namespace qvl::cpu {

// Whether sample_row() may need `scratch` of sample_scratch_bytes(vocab) for this row. The caller allocates
// it beforehand, because sample_row() runs in a thread pool, where an allocation must not throw.
bool needs_scratch(const qvl_sampling& sampling, const int32_t* counts);
size_t sample_scratch_bytes(int32_t vocab);

// Sample a token from logits [vocab]. counts [vocab]: occurrences of each generated token, for penalties;
// that of the sampled token is incremented; may be NULL. Returns -1 if the row has a NaN, a positive infinity
// or no finite value.
int32_t sample_row(int32_t vocab, const float* logits, const qvl_sampling& sampling, int32_t* counts,
                   Buffer& scratch);

// Natural log-probabilities under the unchanged logits of a row: of the sampled `token`, unless `logprob` is
// NULL, and of the n_top most likely tokens (at most kMaxLogprobs), in descending order. If `token` is -1,
// all log-probabilities are NaN and all most likely tokens are -1.
void row_logprobs(int32_t vocab, const float* logits, int32_t token, float* logprob, int32_t n_top,
                  int32_t* top_tokens, float* top_logprobs);

}  // namespace qvl::cpu
