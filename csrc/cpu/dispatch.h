// Which kernels this processor can run.
#pragma once

#include "cpu/kernels/table.h"

namespace qvl::cpu {

// The kernels for `isa`, or the best there are for QVL_ISA_BEST. Fails if the processor lacks the
// instructions.
const Kernels& kernels_for(qvl_isa isa);

const char* isa_name(qvl_isa isa);

}  // namespace qvl::cpu
