// Launches of kernels/convert.cu.
#include "cuda/kernels/convert.h"

#include "cuda/ops.h"

namespace qvl::cuda {

void to_half(const Gpu& gpu, CUstream stream, const float* x, int64_t n, void* y) {
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>((n + 8 * kThreads - 1) / (8 * kThreads));
  gpu.launch(stream, "to_half_8", {blocks}, kThreads, 0, ToHalf{x, y, n}, /*early=*/true);
}

}  // namespace qvl::cuda
