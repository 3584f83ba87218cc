// Kernels of the types with zero points (groups.cc), which kernels.cc adds to an ISA's table.
#pragma once

#include "cpu/kernels/table.h"

#define QVL_JOIN_NAMES(a, b) a##b
#define QVL_JOIN(a, b) QVL_JOIN_NAMES(a, b)
#define QVL_ADD_GROUPS QVL_JOIN(QVL_KERNELS, _add_groups)

namespace qvl::cpu {

void QVL_ADD_GROUPS(Kernels& k);

}  // namespace qvl::cpu
