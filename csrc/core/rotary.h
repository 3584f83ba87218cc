// Rotary angles with dynamic NTK scaling, and logn scaling of the query.
#pragma once

#include "qwenvl.h"

namespace qvl {

// Number of times that seq_length must be doubled to reach prompt_len; 0 without NTK. It determines the
// rotary base.
int ntk_doublings(const qvl_config& config, int prompt_len);

// Factor alpha of dynamic NTK, max(1, 2^ceil(log2(prompt_len / seq_length) + 1) - 1); 1 without NTK. The
// rotary base is multiplied by alpha^(head_dim / (head_dim - 2)).
double ntk_alpha(const qvl_config& config, int prompt_len);

// Rotary frequencies [head_dim / 2] of a request; pair i is rotated by position * frequencies[i].
void rotary_frequencies(const qvl_config& config, int prompt_len, float* frequencies);

// Cosines and sines [head_dim / 2] of the rotary angles at a position.
void rotary_row(const qvl_config& config, const float* frequencies, int position, float* cos, float* sin);

// Scale of the query at a position: logn / sqrt(head_dim). logn is 1 if config.logn is 0 or
// position < seq_length, else log(position + 1) / log(seq_length).
float query_scale(const qvl_config& config, int position);

}  // namespace qvl
