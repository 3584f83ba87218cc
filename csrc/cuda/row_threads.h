// Block sizes of kernels with one block per row (kernels/row_sum.cuh).
#pragma once

#include <algorithm>

namespace qvl::cuda {

// Whether a row fits the registers of its threads: it consists of float4, at most 2 per thread with 1024
// threads.
inline bool fits_registers(int width) {
  return width % 4 == 0 && width <= 4 * 2 * 1024;
}

// Number of threads of a row's block: two float4 per thread, whole warps, at most 1024 threads. It must
// depend only on the width, because it determines the order of the additions.
inline int row_threads(int width) {
  return std::clamp((width + 255) / 256 * 32, 32, 1024);
}

}  // namespace qvl::cuda
