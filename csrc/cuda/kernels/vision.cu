// Kernels of the vision tower and the resampler between the products: patches, LayerNorm, addition of
// positions. attention_dense.cu has the attention.
//
// Layout:
//
//   cut_patches   a block per patch: image float32 [3][size][size] -> H [patch][3][patch_size][patch_size],
//                 padded with zeros to `stride`, so that the convolution is a product with conv1.weight
//   layer_norm    a block per row: its mean, its variance (as the mean of squared differences from the mean,
//                 without cancellation) and the output; layer_norm_held reads the row once and keeps it in
//                 registers (float4 v of thread t at 4 * (v * threads + t))
//   add_rows      a float4 or a float per thread: x [n][width] += the rows of add, repeated
//
// Cost. Memory-bound: a norm of 1024 rows of 1664 reads 6.8 MB of float32 and writes 3.4 MB of H, 2.4 us at
// memory bandwidth and less from the L2 cache (a norm with a warp per row was slower on an H200, 4.6 us
// against 3.8: too few loads in flight); the patches of an image are read once, 2.4 MB, and written once,
// 1.2 MB.
//
// Reference: float64 in PyTorch, tests/cuda/test_vision_rows.py.
#include "cuda/kernels/row_sum.cuh"
#include "cuda/kernels/vision.h"

namespace qvl::cuda {

// One block per patch.
extern "C" __global__ void __launch_bounds__(256) cut_patches(const __grid_constant__ CutPatchesParams p) {
  start_successors();
  wait_for_predecessors();
  const int grid = p.size / p.patch, area = p.patch * p.patch;
  const int64 image = blockIdx.x / (grid * grid);
  const int patch = blockIdx.x % (grid * grid);
  const int top_edge = patch / grid * p.patch, left_edge = patch % grid * p.patch;
  const float* from = p.images + 3 * image * p.size * p.size;
  H* to = static_cast<H*>(p.y) + static_cast<int64>(blockIdx.x) * p.stride;
  for (int i = threadIdx.x; i < p.stride; i += blockDim.x) {
    const int channel = i / area, row = i % area / p.patch, column = i % p.patch;
    float value = 0;
    if (channel < 3)
      value = from[(static_cast<int64>(channel) * p.size + top_edge + row) * p.size + left_edge + column];
    to[i] = to_half(value);
  }
}

// LayerNorm of a row by a block. kHeld: the row is kept in registers; fits_registers() of row_threads.h says
// whether its width allows this.
template <bool kHeld>
__device__ void layer_norm_row(const LayerNormParams& p) {
  __shared__ float scratch[2][32];
  start_successors();
  wait_for_predecessors();
  const int width = p.width;
  const int64 first = static_cast<int64>(blockIdx.x) * width;
  const float* x = p.x + first;
  const float* add = p.add != nullptr ? p.add + static_cast<int64>(blockIdx.x % p.period) * width : nullptr;
  H* y_half = p.y_half != nullptr ? static_cast<H*>(p.y_half) + first : nullptr;
  float* y_float = p.y_float != nullptr ? p.y_float + first : nullptr;
  const float n = static_cast<float>(width);
  float total = 0, squares = 0;
  if constexpr (kHeld) {
    float4 values[kRowVectors];
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      values[v] = i < width ? load4(x + i) : float4{0, 0, 0, 0};
    }
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const float4 a = values[v];
      total += (a.x + a.y) + (a.z + a.w);
    }
    const float mean = block_sum(total, scratch[0]) / n;
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      if (4 * (v * blockDim.x + threadIdx.x) >= width) continue;
      float4& a = values[v];
      a.x -= mean, a.y -= mean, a.z -= mean, a.w -= mean;
      squares += (a.x * a.x + a.y * a.y) + (a.z * a.z + a.w * a.w);
    }
    float4 weights[kRowVectors];  // requested before the barrier in block_sum
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      if (i < width) weights[v] = load4(p.weight + i);
    }
    const float scale = 1 / sqrtf(block_sum(squares, scratch[1]) / n + p.epsilon);
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      if (i >= width) continue;
      const float4 w = weights[v], b = load4(p.bias + i);
      float4 a = values[v];
      a.x = a.x * scale * w.x + b.x;
      a.y = a.y * scale * w.y + b.y;
      a.z = a.z * scale * w.z + b.z;
      a.w = a.w * scale * w.w + b.w;
      if (y_float != nullptr) *reinterpret_cast<float4*>(y_float + i) = a;
      if (y_half == nullptr) continue;
      const float4 added = add != nullptr ? load4(add + i) : float4{0, 0, 0, 0};
      store4(y_half + i, a.x + added.x, a.y + added.y, a.z + added.z, a.w + added.w);
    }
  } else {
    for (int i = threadIdx.x; i < width; i += blockDim.x) total += x[i];
    const float mean = block_sum(total, scratch[0]) / n;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / sqrtf(block_sum(squares, scratch[1]) / n + p.epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      const float value = (x[i] - mean) * scale * p.weight[i] + p.bias[i];
      if (y_float != nullptr) y_float[i] = value;
      if (y_half != nullptr) y_half[i] = to_half(add != nullptr ? value + add[i] : value);
    }
  }
}

extern "C" __global__ void __launch_bounds__(1024, kRowBlocks)
    layer_norm_held(const __grid_constant__ LayerNormParams p) {
  layer_norm_row<true>(p);
}

extern "C" __global__ void __launch_bounds__(1024, kRowBlocks)
    layer_norm_any(const __grid_constant__ LayerNormParams p) {
  layer_norm_row<false>(p);
}

extern "C" __global__ void __launch_bounds__(kAddThreads)
    add_rows_4(const __grid_constant__ AddRowsParams p) {
  start_successors();
  wait_for_predecessors();
  const int64 i = static_cast<int64>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= p.values) return;
  const float4 a = load4(p.x + 4 * i), b = load4(p.add + 4 * (i % p.period));
  *reinterpret_cast<float4*>(p.x + 4 * i) = float4{a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

extern "C" __global__ void __launch_bounds__(kAddThreads)
    add_rows_1(const __grid_constant__ AddRowsParams p) {
  start_successors();
  wait_for_predecessors();
  const int64 i = static_cast<int64>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i < p.values) p.x[i] += p.add[i % p.period];
}

}  // namespace qvl::cuda
