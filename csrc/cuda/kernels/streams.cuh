// Building blocks of kernels that stream weights or keys from memory: asynchronous copies (cp.async) and
// tensor-core products (mma). Before sm_80 plain loads replace the copies, and sums over warp shuffles
// replace the products. mma.cuh has the like, from sm_80 on, for prompts and images; no kernel includes both.
//
// Use of the copies: linear_decode.cu and linear_decode_wide.cu keep a ring of slots in shared memory. A step
// of their loops reads one slot, while the copies to the next slots are in flight. With three slots, of which
// 0 and 1 are requested before the loop, the first step is:
//
//   slot 0        slot 1        slot 2            wait_for_copies<1>() .. read slot 0
//   | lane 0..31 | lane 0..31 | lane 0..31 |      .. copy_async16(slot 2) .. commit_copies()
//
// After wait_for_copies a lane may read the bytes that it has copied itself; to read those of other lanes it
// also needs a barrier.
//
// Cost of copy_async16: 16 bytes per lane and instruction, 512 per warp; the L2 cache fetches 128 bytes at a
// time.
//
// Reference: tested through the kernels, tests/cuda/test_decode.py, test_low_rank.py.
#pragma once

#include "cuda/kernels/common.cuh"

namespace qvl::cuda {

__device__ inline uint32 shared_address(const void* p) {
  return static_cast<uint32>(__cvta_generic_to_shared(p));
}

// Copy 16 bytes to shared memory asynchronously; if not `valid`, write zeros.
__device__ inline void copy_async16(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

// Copy 4 or 8 bytes to shared memory asynchronously.
template <int bytes>
__device__ inline void copy_async_small(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(bytes)
               : "memory");
#else
  for (int i = 0; i < bytes / 4; ++i) static_cast<uint32*>(to)[i] = static_cast<const uint32*>(from)[i];
#endif
}

// Commit the copies since the last commit as a group.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most n of the thread's committed groups are in flight.
template <int n>
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// sums [16, 8] += a [16, 16] b [16, 8], with the fragment layout of mma.m16n8k16. Lane 4 g + t holds
//
//   a     row g: a0, a2   row g + 8: a1, a3      two values of k per register
//   b     column g: b0, b1
//   sums  rows g, g + 8, columns 2 t, 2 t + 1
//
// a0, a1 and b0 have the same two values of k; a2, a3 and b1 have two others. Which values of k these are
// does not matter, provided that a and b agree: the caller may assign the 16 values of k to lanes and
// registers in any order.
__device__ inline void multiply(float (&sums)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0,
                                uint32 b1) {
#if __CUDA_ARCH__ >= 800
#ifdef QVL_COMPUTE_BFLOAT16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
#endif
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  // The first of the four lanes that have the values of this lane's rows of a; the first of the eight that
  // have those of its two columns of b.
  const int lane = threadIdx.x % 32, row = lane & ~3, column = lane % 4 * 8;
  const uint32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  for (int t = 0; t < 4; ++t) {
    for (int half = 0; half < 2; ++half) {
      const uint32 low = __shfl_sync(0xFFFFFFFFu, b[half], column + t);
      const uint32 high = __shfl_sync(0xFFFFFFFFu, b[half], column + 4 + t);
      const float2 x = to_float2(reinterpret_cast<const H2&>(low));
      const float2 y = to_float2(reinterpret_cast<const H2&>(high));
      for (int upper = 0; upper < 2; ++upper) {
        const uint32 bits = __shfl_sync(0xFFFFFFFFu, a[2 * half + upper], row + t);
        const float2 w = to_float2(reinterpret_cast<const H2&>(bits));
        sums[2 * upper] += w.x * x.x + w.y * x.y;
        sums[2 * upper + 1] += w.x * y.x + w.y * y.y;
      }
    }
  }
#endif
}

}  // namespace qvl::cuda
