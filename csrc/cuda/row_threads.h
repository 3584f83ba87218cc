// Block sizes of kernels with one block per row (kernels/row_sum.cuh).
#pragma once

#include <algorithm>

namespace qvl::cuda {

// Whether a row can be kept in the registers of its threads: its width is a multiple of 4 (float4), and at
// most 2 float4 (kRowVectors of row_sum.cuh) for each of 1024 threads.
inline bool fits_registers(int width) {
  return width % 4 == 0 && width <= 4 * 2 * 1024;
}

// Number of threads of a row's block: one per two float4, rounded up to whole warps, at most 1024. It must
// depend only on the width, because it determines the order of the additions.
inline int row_threads(int width) {
  return std::clamp((width + 255) / 256 * 32, 32, 1024);
}

}  // namespace qvl::cuda
