// Block-wide sums for kernels with one block per row, and vectors of 4 and 8 values.
//
//   threads   | warp 0 | warp 1 | .. |   5 shuffles in each warp -> scratch [warps] -> barrier -> 5 shuffles
//
// Cost: 10 shuffles and one barrier for any width.
//
// Reference: tested through the norms, tests/cuda/test_elementwise.py, test_vision_rows.py.
#pragma once

#include "cuda/kernels/common.cuh"

namespace qvl::cuda {

// For __launch_bounds__: blocks of 1024 threads that are resident on a multiprocessor at a time, 2 on the
// architectures that the #if lists, which have 2048 threads per multiprocessor, else 1.
#if __CUDA_ARCH__ == 700 || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int kRowBlocks = 2;
#else
constexpr int kRowBlocks = 1;
#endif

constexpr int kRowVectors = 2;  // maximum number of float4 of a row in a thread's registers

// Sum the threads' values and return the sum in all threads. The order of the additions depends only on the
// number of threads. scratch: 32 floats of shared memory; each call in a kernel needs its own.
__device__ inline float block_sum(float value, float* scratch) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  value = warp_sum(value);
  if (lane == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.f);
}

__device__ inline float4 load4(const float* at) {
  return *reinterpret_cast<const float4*>(at);
}

struct alignas(8) Half4 {
  H2 pairs[2];
};

struct alignas(16) Half8 {
  H2 pairs[4];
};

// Store four values as H at `at`, 8-byte aligned.
__device__ inline void store4(H* at, float a, float b, float c, float d) {
  *reinterpret_cast<Half4*>(at) = Half4{{to_half2(a, b), to_half2(c, d)}};
}

}  // namespace qvl::cuda
