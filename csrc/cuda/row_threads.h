// Block sizes of kernels with one block per row (kernels/row_sum.cuh).
#pragma once

#include <algorithm>

namespace qvl::cuda {

// Whether a row fits the registers of its threads: whole float4, at most 2 per thread.
inline bool row_held(int width) {
  return width % 4 == 0 && width <= 4 * 2 * 1024;
}

// Number of threads with two float4 each, at most 1024. It must depend only on the width, because it
// determines the order of a row's sums.
inline int row_threads(int width) {
  return std::clamp((width + 255) / 256 * 32, 32, 1024);
}

}  // namespace qvl::cuda
