// Kernels of the types with zero points (groups.cc), which kernels.cc adds to the table of an ISA.
#pragma once

#include "cpu/kernels/table.h"

// Name of the function for the ISA being compiled, such as avx2_kernels_add_groups; the build defines
// QVL_KERNELS, here as avx2_kernels.
#define QVL_JOIN_NAMES(a, b) a##b
#define QVL_JOIN(a, b) QVL_JOIN_NAMES(a, b)
#define QVL_ADD_GROUPS QVL_JOIN(QVL_KERNELS, _add_groups)

namespace qvl::cpu {

void QVL_ADD_GROUPS(Kernels& k);

}  // namespace qvl::cpu
