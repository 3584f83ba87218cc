// The parts of CUDA C++ and of cuda_bf16.h that the kernels in the linear_decode.cc of this folder use, for a
// C++ compiler (tests/engine/test_hopper_products.py). Each thread of a block is a thread of the host; blocks
// of upload_matrix.cu have one thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_ARCH_FEAT_SM90_ALL

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local Dim3 threadIdx, blockIdx;
inline thread_local Dim3 blockDim, gridDim;

struct uint4 {
  unsigned x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}

inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
template <class Value>
Value __ldcg(const Value* from) {
  return *from;
}
inline int atomicAdd(int* to, int value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
inline void __threadfence() {}
inline float __saturatef(float x) {
  return std::fmin(std::fmax(x, 0.f), 1.f);
}
inline float __expf(float x) {
  return std::exp(x);
}
// Kernels shuffle signed values only if all lanes have the same one.
inline int __shfl_sync(unsigned, int value, int) {
  return value;
}
// For warp_sum and warp_max, which the kernels compiled here do not call.
inline float __shfl_xor_sync(unsigned, float, int) {
  std::abort();
}
// The next three functions exchange values between the lanes of a warp; the lanes wait for each other.
unsigned __shfl_sync(unsigned, unsigned value, int lane);
unsigned long long __shfl_up_sync(unsigned, unsigned long long value, int by);
unsigned __ballot_sync(unsigned, bool value);
inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
void __syncthreads();

struct __nv_bfloat16 {
  unsigned short bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(unsigned{value.bits} << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return {static_cast<unsigned short>(bits >> 16 | 0x40)};
  return {static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(__bfloat162float(a.x) + __bfloat162float(b.x),
                               __bfloat162float(a.y) + __bfloat162float(b.y));
}
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(__bfloat162float(a.x) - __bfloat162float(b.x),
                               __bfloat162float(a.y) - __bfloat162float(b.y));
}
