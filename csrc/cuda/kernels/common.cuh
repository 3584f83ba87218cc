// Types and helpers of all kernels. Compiled by NVRTC or nvcc, once with QVL_COMPUTE_BFLOAT16 defined (only
// for sm_80 and newer) and once without: H, the compute type, is bfloat16 or float16. Tests also compile some
// kernels for the host (tests/engine/host_gpu). Headers of the standard library, which NVRTC does not have,
// must not be included.
#pragma once

#ifdef QVL_COMPUTE_BFLOAT16
#include <cuda_bf16.h>
#else
#include <cuda_fp16.h>
#endif

namespace qvl::cuda {

using int8 = signed char;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

#ifdef QVL_COMPUTE_BFLOAT16
using H = __nv_bfloat16;
using H2 = __nv_bfloat162;
__device__ inline float to_float(H value) {
  return __bfloat162float(value);
}
__device__ inline H to_half(float value) {
  return __float2bfloat16_rn(value);
}
__device__ inline H2 to_half2(float low, float high) {
  return __floats2bfloat162_rn(low, high);
}
__device__ inline float2 to_float2(H2 value) {
  return __bfloat1622float2(value);
}
#else
using H = __half;
using H2 = __half2;
__device__ inline float to_float(H value) {
  return __half2float(value);
}
// Saturate: a value out of range becomes the nearest finite one, not infinity; NaN stays NaN.
__device__ inline float saturated(float value) {
  return value != value ? value : fminf(fmaxf(value, -65504.f), 65504.f);
}
__device__ inline H to_half(float value) {
  return __float2half_rn(saturated(value));
}
__device__ inline H2 to_half2(float low, float high) {
  return __floats2half2_rn(saturated(low), saturated(high));
}
__device__ inline float2 to_float2(H2 value) {
  return __half22float2(value);
}
#endif

// In a kernel launched early (Gpu::launch), wait until the preceding kernels have ended and their writes are
// visible. No-op before sm_90.
__device__ inline void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allow the next kernel in the stream, if it is launched early, to start once every block of this kernel has
// called this function or ended.
__device__ inline void start_successors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int distance = 16; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  return value;
}

}  // namespace qvl::cuda
