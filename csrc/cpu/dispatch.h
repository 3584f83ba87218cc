// Kernel selection for this processor.
#pragma once

#include "cpu/kernels/table.h"

namespace qvl::cpu {

// Kernels for `isa`; QVL_ISA_BEST: the best ISA supported by the processor and the build. Throws
// QVL_UNSUPPORTED if the processor or the build does not support the ISA.
const Kernels& kernels_for(qvl_isa isa);

const char* isa_name(qvl_isa isa);

}  // namespace qvl::cpu
