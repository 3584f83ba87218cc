// Patches, norm and positions of the vision tower.
//
// Bound by bytes: a norm of 1024 rows of 1664 reads 6.8 MB of float32 and writes 3.4 MB of H, 2.4 us at the
// memory's rate and less from the L2 cache; a picture's patches are 2.4 MB in and 1.2 MB out, once. A row of
// the norm is read once and held in the registers of a warp, or a block, for its mean, its variance (of the
// differences from the mean, so that nothing cancels) and its output.
#include "cuda/kernels/row_sum.cuh"
#include "cuda/kernels/vision.h"

namespace qvl::cuda {

// A block a patch.
extern "C" __global__ void __launch_bounds__(256) cut_patches(const __grid_constant__ CutPatchesParams p) {
  start_successors();
  wait_for_predecessors();
  const int grid = p.size / p.patch, area = p.patch * p.patch;
  const int64 image = blockIdx.x / (grid * grid);
  const int at = blockIdx.x % (grid * grid);
  const int top = at / grid * p.patch, left = at % grid * p.patch;
  const float* from = p.images + 3 * image * p.size * p.size;
  H* to = static_cast<H*>(p.y) + static_cast<int64>(blockIdx.x) * p.stride;
  for (int i = threadIdx.x; i < p.stride; i += blockDim.x) {
    const int channel = i / area, row = i % area / p.patch, column = i % p.patch;
    float value = 0;
    if (channel < 3)
      value = from[(static_cast<int64>(channel) * p.size + top + row) * p.size + left + column];
    to[i] = to_half(value);
  }
}

// Where a row's output goes.
struct NormOutput {
  const float* add;
  H* y_half;
  float* y_float;

  __device__ NormOutput(const LayerNormParams& p, int row) {
    const int64 first = static_cast<int64>(row) * p.width;
    add = p.add != nullptr ? p.add + static_cast<int64>(row % p.period) * p.width : nullptr;
    y_half = p.y_half != nullptr ? static_cast<H*>(p.y_half) + first : nullptr;
    y_float = p.y_float != nullptr ? p.y_float + first : nullptr;
  }

  // Four values from i on: a * scale * w + b.
  __device__ void put(int i, float4 a, float scale, float4 w, float4 b) const {
    a.x = a.x * scale * w.x + b.x;
    a.y = a.y * scale * w.y + b.y;
    a.z = a.z * scale * w.z + b.z;
    a.w = a.w * scale * w.w + b.w;
    if (y_float != nullptr) *reinterpret_cast<float4*>(y_float + i) = a;
    if (y_half == nullptr) return;
    const float4 more = add != nullptr ? load4(add + i) : float4{0, 0, 0, 0};
    store4(y_half + i, a.x + more.x, a.y + more.y, a.z + more.z, a.w + more.w);
  }
};

__device__ inline float sum4(float4 a) {
  return (a.x + a.y) + (a.z + a.w);
}

__device__ inline float squares4(float4 a) {
  return (a.x * a.x + a.y * a.y) + (a.z * a.z + a.w * a.w);
}

__device__ inline float4 minus(float4 a, float b) {
  return {a.x - b, a.y - b, a.z - b, a.w - b};
}

// A block a row. kHeld: the width is a multiple of 4 and the row fits the registers of its threads.
template <bool kHeld>
__device__ void layer_norm_row(const LayerNormParams& p) {
  __shared__ float rooms[2][32];
  start_successors();
  wait_for_predecessors();
  const int width = p.width;
  const float* x = p.x + static_cast<int64>(blockIdx.x) * width;
  const NormOutput output(p, blockIdx.x);
  const float n = static_cast<float>(width);
  float total = 0, squares = 0;
  if constexpr (kHeld) {
    float4 values[kRowVectors], weights[kRowVectors];
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      values[v] = i < width ? load4(x + i) : float4{0, 0, 0, 0};
    }
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) total += sum4(values[v]);
    const float mean = block_sum(total, rooms[0]) / n;
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      if (i >= width) continue;
      weights[v] = load4(p.weight + i);  // on its way before the barrier
      values[v] = minus(values[v], mean);
      squares += squares4(values[v]);
    }
    const float scale = 1 / sqrtf(block_sum(squares, rooms[1]) / n + p.epsilon);
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      if (i < width) output.put(i, values[v], scale, weights[v], load4(p.bias + i));
    }
  } else {
    for (int i = threadIdx.x; i < width; i += blockDim.x) total += x[i];
    const float mean = block_sum(total, rooms[0]) / n;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / sqrtf(block_sum(squares, rooms[1]) / n + p.epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      const float value = (x[i] - mean) * scale * p.weight[i] + p.bias[i];
      if (output.y_float != nullptr) output.y_float[i] = value;
      if (output.y_half == nullptr) continue;
      output.y_half[i] = to_half(output.add != nullptr ? value + output.add[i] : value);
    }
  }
}

// A warp a row of up to kNormWarpWidth values, a multiple of 4. All rows of a picture are then on the GPU at
// once, with room for those of the next kernel. Weights are in shared memory before the predecessors end.
extern "C" __global__ void __launch_bounds__(32 * kNormWarps)
    layer_norm_warp(const __grid_constant__ LayerNormParams p) {
  constexpr int kVectors = kNormWarpWidth / 4 / 32;
  __shared__ float4 weights[kNormWarpWidth / 4], biases[kNormWarpWidth / 4];
  start_successors();
  for (int i = threadIdx.x; 4 * i < p.width; i += blockDim.x) {
    weights[i] = load4(p.weight + 4 * i);
    biases[i] = load4(p.bias + 4 * i);
  }
  __syncthreads();
  wait_for_predecessors();
  const int row = blockIdx.x * kNormWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.n) return;
  const float* x = p.x + static_cast<int64>(row) * p.width;
  float4 values[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = 4 * (32 * v + lane);
    values[v] = i < p.width ? load4(x + i) : float4{0, 0, 0, 0};
  }
  const float n = static_cast<float>(p.width);
  float total = 0, squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) total += sum4(values[v]);
  const float mean = warp_sum(total) / n;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (4 * (32 * v + lane) >= p.width) continue;
    values[v] = minus(values[v], mean);
    squares += squares4(values[v]);
  }
  const float scale = 1 / sqrtf(warp_sum(squares) / n + p.epsilon);
  const NormOutput output(p, row);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = 4 * (32 * v + lane);
    if (i < p.width) output.put(i, values[v], scale, weights[i / 4], biases[i / 4]);
  }
}

extern "C" __global__ void __launch_bounds__(1024)
    layer_norm_held(const __grid_constant__ LayerNormParams p) {
  layer_norm_row<true>(p);
}

extern "C" __global__ void __launch_bounds__(1024) layer_norm_any(const __grid_constant__ LayerNormParams p) {
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
