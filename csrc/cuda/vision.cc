// Launches of kernels/vision.cu.
#include "cuda/kernels/vision.h"
#include "cuda/ops.h"
#include "cuda/row_threads.h"

namespace qvl::cuda {

void cut_patches(const Gpu& gpu, CUstream stream, const float* images, int n, int size, int patch, int stride,
                 void* y) {
  const int grid = size / patch;
  const CutPatchesParams params{images, y, size, patch, stride};
  gpu.launch(stream, "cut_patches", {static_cast<unsigned>(n) * static_cast<unsigned>(grid * grid)},
             /*threads=*/256, 0, params, /*early=*/true);
}

void layer_norm(const Gpu& gpu, CUstream stream, const float* x, const float* weight, const float* bias,
                float epsilon, int n, int width, const float* add, int period, void* y_half, float* y_float) {
  const LayerNormParams params{x, weight, bias, add, y_half, y_float, width, period, epsilon};
  gpu.launch(stream, fits_registers(width) ? "layer_norm_held" : "layer_norm_any", {static_cast<unsigned>(n)},
             row_threads(width), 0, params, /*early=*/true);
}

void add_rows(const Gpu& gpu, CUstream stream, float* x, const float* add, int n, int width, int period) {
  const int step = width % 4 == 0 ? 4 : 1;  // values per thread
  const int64_t values = int64_t{n} * width / step;
  const AddRowsParams params{x, add, values, int64_t{period} * width / step};
  gpu.launch(stream, step == 4 ? "add_rows_4" : "add_rows_1",
             {static_cast<unsigned>((values + kAddThreads - 1) / kAddThreads)}, kAddThreads, 0, params,
             /*early=*/true);
}

}  // namespace qvl::cuda
