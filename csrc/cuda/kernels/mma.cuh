// Wrappers of tensor core and asynchronous copy instructions of sm_80 and newer: cp.async, ldmatrix,
// mma.m16n8k16.
//
// Layout of mma.m16n8k16, lane 4 g + t:
//
//   a [16][16]    row g: a0: k = 2t, 2t + 1; a2: k = 8 + 2t, 9 + 2t        row g + 8: a1, a3 for the same k
//   b [16][8]     column g: b0: k = 2t, 2t + 1; b1: k = 8 + 2t, 9 + 2t
//   sums [16][8]  columns 2t, 2t + 1: sums 0, 1: row g; sums 2, 3: row g + 8
//
// Cost of an mma: 2 x 16 x 8 x 16 operations.
//
// Reference: tested through the kernels for any GPU, tests/cuda/test_prompt_linear.py (tile PORTABLE) and
// test_prompt_attention.py (`portable` True).
#pragma once

#include "cuda/kernels/common.cuh"

#if __CUDA_ARCH__ >= 800

namespace qvl::cuda {

__device__ inline uint32 shared_address(const void* p) {
  return static_cast<uint32>(__cvta_generic_to_shared(p));
}

// Copy the first `bytes` of 16 bytes to shared memory asynchronously, and write zeros to the others.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most n groups of copies are in flight.
template <int n>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Load four 8 x 8 matrices; lane i provides the address of row i % 8 of matrix i / 8. Lane 4 g + t receives
// values 2t and 2t + 1 of row g of each matrix; with load_matrices_transposed(), of column g.
__device__ inline void load_matrices(uint32 (&to)[4], const H* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32 (&to)[4], const H* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums [16, 8] += a [16, 16] b [16, 8].
__device__ inline void multiply(float (&sums)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
#ifdef QVL_COMPUTE_BFLOAT16
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
#endif
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32 as_bits(H2 value) {
  return *reinterpret_cast<uint32*>(&value);
}

}  // namespace qvl::cuda

#endif
