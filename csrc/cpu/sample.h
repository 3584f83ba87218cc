// Picking a token from a row of logits.
#pragma once

#include "cpu/memory.h"
#include "qwenvl.h"

namespace qvl::cpu {

// Whether sample_row() needs `scratch` for this row: sample_scratch_bytes(vocab).
bool needs_scratch(const qvl_sampling& sampling, const int32_t* counts);
size_t sample_scratch_bytes(int32_t vocab);

// logits [vocab]; counts may be NULL. The picked token's count is raised. -1 if the row has a NaN or no
// finite value.
int32_t sample_row(int32_t vocab, const float* logits, const qvl_sampling& sampling, int32_t* counts,
                   Buffer& scratch);

// Natural logarithms of probabilities under the logits of a row that gave `token`: of that token, unless
// `logprob` is NULL, and of the n_top likeliest (at most kMaxLogprobs), the likeliest first. With token -1
// they are NaN, and the likeliest -1.
void row_logprobs(int32_t vocab, const float* logits, int32_t token, float* logprob, int32_t n_top,
                  int32_t* top_tokens, float* top_logprobs);

}  // namespace qvl::cpu
