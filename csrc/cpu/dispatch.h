// Choice of the kernels for this processor.
#pragma once

#include "cpu/kernels/table.h"

namespace qvl::cpu {

// Kernels for `isa`; QVL_ISA_BEST: the best ISA of the processor and the build. Fails if the processor lacks
// the instructions.
const Kernels& kernels_for(qvl_isa isa);

const char* isa_name(qvl_isa isa);

}  // namespace qvl::cpu
