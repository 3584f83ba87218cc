// Hopper's instructions on the host, in place of csrc/cuda/kernels/hopper.cuh, for test_hopper_products.py:
// those that the products of decode steps use. The order of their effects is one that the hardware allows but
// rarely has: the copy engine, a thread of its own, executes the copies in random order, and each thread of a
// kernel computes its part of a product only in wgmma_wait (operands in registers are read at once).
// ../../linear_decode.cc defines what is only declared here.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/tensor_map.h"

namespace qvl::cuda {

// Shared memory; an address is an offset in it.
extern char* const shared_memory;
inline uint32 __cvta_generic_to_shared(const void* p) {
  return static_cast<uint32>(static_cast<const char*>(p) - shared_memory);
}

void barrier_init(uint32 barrier, int arrivals);
void barrier_expect(uint32 barrier, int bytes);
void barrier_wait(uint32 barrier, uint32 parity);
void barrier_arrive(uint32 barrier);
inline void publish_barriers() {}
inline void prefetch(const TensorMap&) {}

// Queue the copy of a box whose first element is at `at`, the innermost coordinate first.
void copy_later(uint32 to, const TensorMap& map, std::vector<int> at, uint32 barrier);
inline void copy_box(uint32 to, const TensorMap& map, int x0, int x1, uint32 barrier) {
  copy_later(to, map, {x0, x1}, barrier);
}
inline void copy_box(uint32 to, const TensorMap& map, int x0, int x1, int x2, uint32 barrier) {
  copy_later(to, map, {x0, x1, x2}, barrier);
}

// Named barriers (the barriers above are mbarriers). The kernel uses 0 and 1, this emulation the others: from
// kOfGroups on one for each of 4 warpgroups, from kOfWarps on one for each of 17 warps (544 threads).
constexpr int kOfGroups = 2, kOfWarps = 6, kMeetings = kOfWarps + 17;
void meet(int barrier, int threads);  // wait until all `threads` threads of the barrier have called it
template <int threads>
inline void threads_sync(int barrier) {
  meet(barrier, threads);
}
inline uint4 load_shared16(uint32 address) {
  uint4 value;
  std::memcpy(&value, shared_memory + address, 16);
  return value;
}
inline uint32 load_shared4(uint32 address) {
  uint32 value;
  std::memcpy(&value, shared_memory + address, 4);
  return value;
}

// A matrix descriptor: the address in units of 16 bytes. Rows of 64 values are swizzled as in
// csrc/cuda/kernels/hopper.cuh.
inline uint64 wgmma_descriptor(uint32 address) {
  return address >> 4;
}
inline float described(uint64 matrix, int row, int k) {
  const uint32 at = static_cast<uint32>(matrix << 4) + row * 128 + 2 * k;
  H value;
  std::memcpy(&value, shared_memory + (at ^ (at >> 3 & 0x70)), 2);
  return to_float(value);
}

inline thread_local std::vector<std::pair<int, std::function<void()>>> products;  // (commit group, product)
inline thread_local int product_group;
inline void wgmma_fence() {}
inline void wgmma_commit() {
  ++product_group;
}
template <int n>  // all lanes of a warp wait together: one then reports that its warp has read the buffers
inline void wgmma_wait() {
  size_t done = 0;
  for (; done < products.size() && products[done].first < product_group - n; ++done) products[done].second();
  products.erase(products.begin(), products.begin() + static_cast<std::ptrdiff_t>(done));
  meet(kOfWarps + static_cast<int>(threadIdx.x / 32), 32);
}
template <int n>
inline void fence_registers(float (&)[n]) {}

// A thread's part of d [64, N] = a [64, 16] * b [N, 16]^T, plus d if `add`. With g = lane / 4 and
// t = lane % 4, the part has the rows g and g + 8 of the warp's 16 rows, and the columns 8 * j + 2 * t and
// 8 * j + 2 * t + 1 for all j < N / 8. a(upper, k): value k of row g, or with `upper` of row g + 8.
template <int N, class A>
inline void add_products(float* d, A&& a, uint64 b, int add) {
  const int t = threadIdx.x % 4;
  for (int i = 0; i < N / 2; ++i) {
    const int upper = i % 4 / 2, column = i / 4 * 8 + 2 * t + i % 2;
    float sum = add ? d[i] : 0;
    for (int k = 0; k < 16; ++k) sum += a(upper, k) * described(b, column, k);
    d[i] = sum;
  }
}

template <int N>
struct Product {
  static void run(float* d, uint64 a, uint64 b, int add) {
    products.emplace_back(product_group, [=] {
      const int row = static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
      add_products<N>(d, [&](int upper, int k) { return described(a, row + 8 * upper, k); }, b, add);
    });
  }
};

// The four lanes of rows g and g + 8 of `a` hold these rows in registers, and exchange them through
// registers_of. All threads of the warpgroup meet, which execute the instruction together.
extern uint32 registers_of[544][4];
template <int N>
struct ProductFromRegisters {
  static void run(float* d, const uint32* a, uint64 b, int add) {
    const int group = threadIdx.x / 128;
    std::vector<float> rows(32);
    std::memcpy(registers_of[threadIdx.x], a, 16);
    meet(kOfGroups + group, 128);
    for (int upper = 0; upper < 2; ++upper) {
      for (int k = 0; k < 16; ++k) {
        const uint32 pair = registers_of[threadIdx.x / 4 * 4 + k % 8 / 2][upper + k / 8 * 2];
        H value;
        std::memcpy(&value, reinterpret_cast<const char*>(&pair) + k % 2 * 2, 2);
        rows[static_cast<size_t>(upper * 16 + k)] = to_float(value);
      }
    }
    meet(kOfGroups + group, 128);
    products.emplace_back(product_group, [=] {
      add_products<N>(d, [&](int upper, int k) { return rows[static_cast<size_t>(upper * 16 + k)]; }, b, add);
    });
  }
};

}  // namespace qvl::cuda
