// Picking a token from a row of logits.
#pragma once

#include "cpu/memory.h"
#include "qwenvl.h"

namespace qvl::cpu {

// logits [vocab]; counts may be NULL. The picked token's count is raised.
int32_t sample_row(int32_t vocab, const float* logits, const qvl_sampling& sampling, int32_t* counts,
                   Buffer& scratch);

}  // namespace qvl::cpu
