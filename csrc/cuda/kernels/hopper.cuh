// Wrappers of Hopper's instructions (sm_90a only): barriers in shared memory (mbarrier), bulk copies by the
// copy engine (TMA), warpgroup matrix products (wgmma).
//
// Layout of a wgmma operand in shared memory, as the copy engine writes it with the 128-byte swizzle: rows of
// 64 values of H, 128 bytes; the 16-byte part p of row r is at part p ^ (r % 8). Groups of 8 rows are aligned
// to 1024 bytes:
//
//   row 0   | p0 p1 p2 p3 p4 p5 p6 p7 |
//   row 1   | p1 p0 p3 p2 p5 p4 p7 p6 |      so that the same part of 8 rows is in different banks
//   row 2   | p2 p3 p0 p1 p6 p7 p4 p5 |      (32 banks of 4 bytes are one row of 128 bytes)
//
// Cost of wgmma.m64nNk16: N / 2 cycles of a multiprocessor (64 x 8 x 16 products in 4 cycles).
//
// Reference: tested through the kernels, tests/cuda; without a GPU, through the products of decode steps, for
// which tests/engine/host_gpu emulates the functions that they use: tests/engine/test_hopper_products.py.
#pragma once

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/tensor_map.h"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace qvl::cuda {

// Addresses of shared memory (barriers, targets of copies) are 32-bit numbers.

// Barriers (mbarrier) count arrivals and bytes of copies in phases, whose parity alternates, beginning with
// 0. A phase ends when there have been `arrivals` arrivals and all expected bytes have been copied.
__device__ inline void barrier_init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Make barriers that this thread has initialised visible to the copy engine and to the other blocks of the
// cluster.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive, and expect copies of `bytes` bytes in this phase.
__device__ inline void barrier_expect(uint32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Wait for the end of the current phase if it has this parity; otherwise the phase with this parity has
// already ended, and the function returns at once. At a new barrier it returns at once for parity 1.
__device__ inline void barrier_wait(uint32 barrier, uint32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni end;\n"
      "bra.uni again;\n"
      "end:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Arrive at the barrier with this address in block `rank` of the cluster. A release at cluster scope, which
// costs a GPU-wide fence (a microsecond), is not needed: the arrival only reports that a buffer has been
// read.
__device__ inline void barrier_arrive(uint32 barrier, uint32 rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Index of this block in its cluster.
__device__ inline uint32 cluster_rank() {
  uint32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Arrive at a barrier of this block.
__device__ inline void barrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Make this thread's writes to shared memory visible to wgmma.
__device__ inline void publish_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barrier for `threads` threads of whole warps; barrier 0 is __syncthreads().
template <int threads>
__device__ inline void threads_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(threads) : "memory");
}
__device__ inline void warpgroup_sync(int barrier) {
  threads_sync<128>(barrier);
}

__device__ inline uint4 load_shared16(uint32 address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address));
  return value;
}
__device__ inline uint32 load_shared4(uint32 address) {
  uint32 value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

// Prefetch a tensor map.
__device__ inline void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copy a box of a tensor to shared memory and report its bytes to the barrier. copy_box: the box at (column,
// row), or at the coordinates x0 (innermost), x1 .., to this block. copy_box_to: to all blocks in the bit
// mask `blocks` (multicast).
__device__ inline void copy_box(uint32 to, const TensorMap& map, int column, int row, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ inline void copy_box_to(uint32 to, const TensorMap& map, int column, int row, uint32 barrier,
                                   uint32 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16>(blocks))
      : "memory");
}

__device__ inline void copy_box(uint32 to, const TensorMap& map, int x0, int x1, int x2, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(barrier)
      : "memory");
}
__device__ inline void copy_box(uint32 to, const TensorMap& map, int x0, int x1, int x2, int x3,
                                uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
      "%5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
      : "memory");
}

// Copy contiguous bytes to shared memory and report them to the barrier; both addresses and `bytes` are
// multiples of 16.
__device__ inline void copy_bytes(uint32 to, const void* from, int bytes, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// wgmma descriptor of an operand: swizzled rows of 64 values, at an address that is a multiple of 1024.
// columns: bytes from 64 values of a row to the next 64 values of this row; used only for the operand b of
// ProductRegisters, whose rows are along N. 1024: bytes from 8 rows to the next 8; bit 62: the swizzle of 128
// bytes.
__device__ inline uint64 wgmma_descriptor(uint32 address, uint32 columns = 16) {
  return static_cast<uint64>(address >> 4 & 0x3FFF) | static_cast<uint64>(columns >> 4) << 16 |
         uint64{1024 >> 4} << 32 | uint64{1} << 62;
}

// wgmma is asynchronous: wgmma_fence, products, wgmma_commit form a group; wgmma_wait<n> waits until
// at most n groups are in flight.
__device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int n>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

// Prevent the compiler from moving uses of the sums before the preceding wgmma_wait().
template <int n>
__device__ inline void fence_registers(float (&sums)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Operands of a wgmma instruction of width N are N / 2 accumulators, descriptors or registers, and the
// accumulate flag (in ProductRegisters the constant 1). QVL_L4 to QVL_L128: the accumulators in the text of
// the instruction; QVL_F4(i) to QVL_F16(i): d[i] .. as operands. In the macros below, A (A0 to A3), B and ADD
// are the numbers of the other operands.
#define QVL_L4 "%0,%1,%2,%3"
#define QVL_L8 QVL_L4 ",%4,%5,%6,%7"
#define QVL_L16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define QVL_L32 QVL_L16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QVL_L48 QVL_L32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QVL_L52 QVL_L48 ",%48,%49,%50,%51"
#define QVL_L64 QVL_L52 ",%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QVL_L72 QVL_L64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define QVL_L96                                                                              \
  QVL_L72                                                                                    \
  ",%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93" \
  ",%94,%95"
#define QVL_L104 QVL_L96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define QVL_L128                                                                                    \
  QVL_L104                                                                                          \
  ",%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122" \
  ",%123,%124,%125,%126,%127"
#define QVL_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QVL_F8(i) QVL_F4(i), QVL_F4(i + 4)
#define QVL_F16(i) QVL_F4(i), QVL_F4(i + 4), QVL_F4(i + 8), QVL_F4(i + 12)
#ifdef QVL_COMPUTE_BFLOAT16
#define QVL_TYPES ".f32.bf16.bf16"
#else
#define QVL_TYPES ".f32.f16.f16"
#endif
#define QVL_PRODUCT(N, LIST, A, B, ADD, ...)                                                                 \
  template <>                                                                                                \
  struct Product<N> {                                                                                        \
    static __device__ inline void run(float* d, uint64 a, uint64 b, int add) {                               \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                   "k16" QVL_TYPES " {" LIST "}, %" A ", %" B ", add, 1, 1, 0, 0;\n}"                        \
                   : __VA_ARGS__                                                                             \
                   : "l"(a), "l"(b), "r"(add));                                                              \
    }                                                                                                        \
  };

#define QVL_PRODUCT_REGISTERS(N, LIST, A0, A1, A2, A3, B, ...)                                          \
  template <>                                                                                           \
  struct ProductRegisters<N> {                                                                          \
    static __device__ inline void run(float* d, const uint32 (&a)[4], uint64 b) {                       \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16" QVL_TYPES " {" LIST "}, {%" A0 ", %" A1 \
                   ", %" A2 ", %" A3 "}, %" B ", 1, 1, 1, 1;"                                           \
                   : __VA_ARGS__                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
    }                                                                                                   \
  };

#define QVL_PRODUCT_FROM_REGISTERS(N, LIST, A0, A1, A2, A3, B, ADD, ...)                                     \
  template <>                                                                                                \
  struct ProductFromRegisters<N> {                                                                           \
    static __device__ inline void run(float* d, const uint32* a, uint64 b, int add) {                        \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                   "k16" QVL_TYPES " {" LIST "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B                  \
                   ", add, 1, 1, 0;\n}"                                                                      \
                   : __VA_ARGS__                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                          \
    }                                                                                                        \
  };

// d [64, N] (+)= a [64, 16] b [N, 16]^T, a and b in shared memory. (+)=: add to d; replace d if `add` is 0.
template <int N>
struct Product;
QVL_PRODUCT(8, QVL_L4, "4", "5", "6", QVL_F4(0))
QVL_PRODUCT(16, QVL_L8, "8", "9", "10", QVL_F8(0))
QVL_PRODUCT(32, QVL_L16, "16", "17", "18", QVL_F16(0))
QVL_PRODUCT(64, QVL_L32, "32", "33", "34", QVL_F16(0), QVL_F16(16))
QVL_PRODUCT(96, QVL_L48, "48", "49", "50", QVL_F16(0), QVL_F16(16), QVL_F16(32))
QVL_PRODUCT(104, QVL_L52, "52", "53", "54", QVL_F16(0), QVL_F16(16), QVL_F16(32), QVL_F4(48))
QVL_PRODUCT(128, QVL_L64, "64", "65", "66", QVL_F16(0), QVL_F16(16), QVL_F16(32), QVL_F16(48))
QVL_PRODUCT(144, QVL_L72, "72", "73", "74", QVL_F16(0), QVL_F16(16), QVL_F16(32), QVL_F16(48), QVL_F4(64),
            QVL_F4(68))
QVL_PRODUCT(256, QVL_L128, "128", "129", "130", QVL_F16(0), QVL_F16(16), QVL_F16(32), QVL_F16(48),
            QVL_F16(64), QVL_F16(80), QVL_F16(96), QVL_F16(112))

// d [64, N] += a [64, 16] b [16, N]: a in registers, b in shared memory, each row with N values of one k. For
// the probabilities and values of attention.
template <int N>
struct ProductRegisters;
QVL_PRODUCT_REGISTERS(64, QVL_L32, "32", "33", "34", "35", "36", QVL_F16(0), QVL_F16(16))
QVL_PRODUCT_REGISTERS(104, QVL_L52, "52", "53", "54", "55", "56", QVL_F16(0), QVL_F16(16), QVL_F16(32),
                      QVL_F4(48))
QVL_PRODUCT_REGISTERS(128, QVL_L64, "64", "65", "66", "67", "68", QVL_F16(0), QVL_F16(16), QVL_F16(32),
                      QVL_F16(48))

// d [64, N] (+)= a [64, 16] b [N, 16]^T: a in registers, b in shared memory, each row with values of k. For
// decode products, whose quantized weights are converted in registers.
template <int N>
struct ProductFromRegisters;
QVL_PRODUCT_FROM_REGISTERS(8, QVL_L4, "4", "5", "6", "7", "8", "9", QVL_F4(0))
QVL_PRODUCT_FROM_REGISTERS(16, QVL_L8, "8", "9", "10", "11", "12", "13", QVL_F8(0))
QVL_PRODUCT_FROM_REGISTERS(32, QVL_L16, "16", "17", "18", "19", "20", "21", QVL_F16(0))
QVL_PRODUCT_FROM_REGISTERS(64, QVL_L32, "32", "33", "34", "35", "36", "37", QVL_F16(0), QVL_F16(16))

}  // namespace qvl::cuda

#endif
