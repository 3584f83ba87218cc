// Sampling of a token from a row of logits.
#pragma once

#include "cpu/memory.h"
#include "qwenvl.h"

namespace qvl::cpu {

// Whether sample_row() needs `scratch` for this row, of sample_scratch_bytes(vocab).
bool needs_scratch(const qvl_sampling& sampling, const int32_t* counts);
size_t sample_scratch_bytes(int32_t vocab);

// Sample from logits [vocab]; counts may be NULL, else the count of the sampled token is incremented. Returns
// -1 if the row has a NaN, a positive infinity or no finite value.
int32_t sample_row(int32_t vocab, const float* logits, const qvl_sampling& sampling, int32_t* counts,
                   Buffer& scratch);

// Natural log-probabilities under the unchanged logits of a row: of its sampled `token`, unless `logprob` is
// NULL, and of the n_top most likely tokens (at most kMaxLogprobs) in order. With token -1 they are NaN, and
// the most likely tokens are -1.
void row_logprobs(int32_t vocab, const float* logits, int32_t token, float* logprob, int32_t n_top,
                  int32_t* top_tokens, float* top_logprobs);

}  // namespace qvl::cpu
