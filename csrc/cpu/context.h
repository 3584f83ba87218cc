// Execution context of an engine: threads, kernels, scratch memory.
#pragma once

#include <vector>

#include "cpu/kernels/table.h"
#include "cpu/memory.h"
#include "cpu/thread_pool.h"

namespace qvl::cpu {

// Number of multiplications, about two microseconds of a core, below which several threads are slower than
// one.
constexpr int64_t kSmallWork = 1 << 16;
// Cost of an elementwise kernel per value, in multiplications.
constexpr int64_t kElementWork = 8;

struct Context {
  const Kernels& kernels;
  ThreadPool pool;
  const bool exact;                    // QVL_COMPUTE_FLOAT32: types with zero points round no activations
  Buffer activations;                  // linear(): prepared or packed x; attention: partial results
  Buffer permuted;                     // linear(): activations permuted to a matrix's column order
  std::vector<Buffer> thread_scratch;  // linear() and attention: one buffer per thread

  Context(const Kernels& kernels, int n_threads, bool exact = false)
      : kernels(kernels), pool(n_threads), exact(exact), thread_scratch(static_cast<size_t>(n_threads)) {}

  // Call body(task, thread) for tasks 0 to n - 1, which cost `work` multiplications in total. If `work` is
  // below kSmallWork, run all tasks on the calling thread.
  template <typename Body>
  void run(int64_t n, int64_t work, Body&& body) {
    if (work < kSmallWork) {
      for (int64_t i = 0; i < n; ++i) body(i, 0);
    } else {
      pool.run(n, body);
    }
  }

  // run() for an elementwise kernel over n rows of `width` values.
  template <typename Body>
  void rows(int64_t n, int64_t width, Body&& body) {
    run(n, kElementWork * n * width, body);
  }
};

}  // namespace qvl::cpu
