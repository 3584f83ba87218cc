// What every computation of an engine uses: its threads, its kernels, its scratch memory.
#pragma once

#include <vector>

#include "cpu/kernels/table.h"
#include "cpu/memory.h"
#include "cpu/thread_pool.h"

namespace qvl::cpu {

// About two microseconds of products on one core, and products that take as long as a value of a norm.
constexpr int64_t kSmallWork = 1 << 16;
constexpr int64_t kElementWork = 8;

struct Context {
  const Kernels& kernels;
  ThreadPool pool;
  Buffer activations;             // of linear(): prepared or packed
  std::vector<Buffer> of_thread;  // of linear() and attention, one a thread

  Context(const Kernels& kernels, int n_threads)
      : kernels(kernels), pool(n_threads), of_thread(static_cast<size_t>(n_threads)) {}

  // body(task, thread) for tasks below n, which are `work` multiplications or loads together: in the calling
  // thread alone if that is less than sharing costs.
  template <typename Body>
  void run(int64_t n, int64_t work, Body&& body) {
    if (work < kSmallWork) {
      for (int64_t i = 0; i < n; ++i) body(i, 0);
    } else {
      pool.run(n, body);
    }
  }

  // The same for n rows of `width` values.
  template <typename Body>
  void rows(int64_t n, int64_t width, Body&& body) {
    run(n, kElementWork * n * width, body);
  }
};

}  // namespace qvl::cpu
