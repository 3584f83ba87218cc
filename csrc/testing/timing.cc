// Memory reads and the bfloat16 instruction vdpbf16ps, to measure their speed without interpreter overhead:
// the limits in benchmarks/cpu_engine.py and benchmarks/textbook.py. On x86-64 the reads need AVX2.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "cpu/memory.h"
#include "cpu/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace qvl;
using namespace qvl::cpu;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <typename Body>
double seconds(Body&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Read a chunk of memory and return a sum of its words. streams: read its four quarters as parallel streams,
// with prefetches of the next chunk; otherwise read it as one stream, without prefetches. Which of the two is
// faster depends on the processor.
#if defined(__x86_64__)
__attribute__((target("avx2")))
#endif
uint64_t read_chunk(const char* from, int64_t bytes, bool streams) {
  typedef uint64_t Vector __attribute__((vector_size(32)));
  Vector sums[4] = {};
  const int64_t quarter = bytes / 4;
  for (int64_t i = 0; i < quarter; i += 32) {
    for (int j = 0; j < 4; ++j) {
      const char* at = streams ? from + j * quarter + i : from + 4 * i + 32 * j;
      Vector words;
      std::memcpy(&words, at, sizeof words);
      sums[j] += words;
      if (streams && i % 64 == 0) __builtin_prefetch(at + bytes, 0, 2);
    }
  }
  const Vector total = sums[0] + sums[1] + sums[2] + sums[3];
  return total[0] + total[1] + total[2] + total[3];
}

constexpr int kReadWays = 3;

// Read memory in chunks and return a sum of its words; the remainder after the last complete chunk is not
// read. way: 0: one stream; 1: four streams in chunks of 16 KiB; 2: four streams in chunks of 64 KiB.
uint64_t read_memory(const char* from, int64_t bytes, int way) {
  const int64_t chunk_bytes = way == 2 ? 1 << 16 : 1 << 14;
  uint64_t total = 0;
  for (int64_t offset = 0; offset + chunk_bytes <= bytes; offset += chunk_bytes) {
    total += read_chunk(from + offset, chunk_bytes, way != 0);
  }
  return total;
}

constexpr int kSums = 24;              // independent sums, enough to hide the latency of the instruction
constexpr int kOperations = 64;        // of a bfloat16 instruction: 32 multiplications and 32 additions
constexpr size_t kCacheLineItems = 8;  // 8-byte items; each thread writes to its own cache line

#if defined(__x86_64__)
// Execute the bfloat16 instruction n * kSums times on registers.
__attribute__((target("avx512f,avx512bf16"))) double bf16_products(int64_t n) {
  __m512 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  __m512i ones = _mm512_set1_epi32(0x3F803F80);  // bfloat16 1 in each half
  asm volatile("" : "+v"(ones));                 // prevents evaluation at compile time
  for (int64_t step = 0; step < n; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], reinterpret_cast<__m512bh>(ones), reinterpret_cast<__m512bh>(ones));
    }
  }
  float total = 0;
  for (const __m512& sum : sums) total += _mm512_reduce_add_ps(sum);
  return static_cast<double>(total);
}
#endif

}  // namespace

// Operations per second of `threads` threads that execute the bfloat16 instruction on registers; 0 if the
// processor lacks the instruction.
EXPORT double qvlt_bf16_peak(int threads) {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx512bf16")) return 0;
  constexpr int64_t kSteps = 2000000;
  ThreadPool pool(threads);
  std::vector<double> sums(static_cast<size_t>(threads) * kCacheLineItems);
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    best = std::min(best, seconds([&] {
                      pool.run(threads, [&](int64_t task, int) {
                        sums[static_cast<size_t>(task) * kCacheLineItems] += bf16_products(kSteps);
                      });
                    }));
  }
  volatile double keep = sums[0];  // the compiler must not remove the computation
  (void)keep;
  return static_cast<double>(kSteps * kSums * kOperations * threads) / best;
#else
  return 0;
#endif
}

// Memory read bandwidth of `threads` threads in bytes per second: the best of `repeats` passes over `bytes`,
// a multiple of 256 KiB. The passes use the three ways of read_memory in turn.
EXPORT double qvlt_read_bandwidth(int threads, int64_t bytes, int repeats) {
  ThreadPool pool(threads);
  Buffer buffer(static_cast<size_t>(bytes));
  char* memory = buffer.get<char>(static_cast<size_t>(bytes));
  std::memset(memory, 1, static_cast<size_t>(bytes));
  constexpr int64_t kChunkBytes = 1 << 18;
  std::vector<uint64_t> sums(static_cast<size_t>(threads) * kCacheLineItems);
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    best = std::min(best, seconds([&] {
                      pool.run(bytes / kChunkBytes, [&](int64_t task, int thread) {
                        sums[static_cast<size_t>(thread) * kCacheLineItems] +=
                            read_memory(memory + task * kChunkBytes, kChunkBytes, i % kReadWays);
                      });
                    }));
  }
  volatile uint64_t keep = sums[0];  // the compiler must not remove the reads
  (void)keep;
  return static_cast<double>(bytes) / best;
}

// read_memory in the calling thread. Which way is fastest depends on the processor.
EXPORT uint64_t qvlt_read_memory(const char* memory, int64_t bytes, int way) {
  return read_memory(memory, bytes, way);
}
