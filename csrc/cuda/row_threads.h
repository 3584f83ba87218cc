// How a row that has a block is shared among its threads (kernels/row_sum.cuh).
#pragma once

#include <algorithm>

namespace qvl::cuda {

// Whether the row can be held in registers: whole float4, 2 at most a thread.
inline bool row_held(int width) {
  return width % 4 == 0 && width <= 4 * 2 * 1024;
}

// Two float4 a thread, as far as 1024 threads go. Of the width alone: the order of a row's sums depends on
// it.
inline int row_threads(int width) {
  return std::clamp((width + 255) / 256 * 32, 32, 1024);
}

}  // namespace qvl::cuda
