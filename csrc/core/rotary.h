// Rotary angles with dynamic NTK scaling, and logn scaling of the query.
#pragma once

#include "qwenvl.h"

namespace qvl {

// How many of 1, 2, 4 ... times seq_length the prompt exceeds, which determines the rotary base; 0 without
// NTK.
int ntk_doublings(const qvl_config& config, int prompt_len);

// max(1, 2^ceil(log2(prompt_len / seq_length) + 1) - 1)
double ntk_alpha(const qvl_config& config, int prompt_len);

// Rotary frequencies [head_dim / 2] of a request; pair i is rotated by position * frequencies[i].
void rotary_frequencies(const qvl_config& config, int prompt_len, float* frequencies);

// cos and sin [head_dim / 2] at a position.
void rotary_row(const qvl_config& config, const float* frequencies, int position, float* cos, float* sin);

// logn / sqrt(head_dim); logn is 1 up to seq_length tokens, then log_seq_length(position + 1).
float query_scale(const qvl_config& config, int position);

}  // namespace qvl
