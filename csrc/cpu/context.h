// What every computation of an engine uses: its threads, its kernels, its scratch memory.
#pragma once

#include <vector>

#include "cpu/kernels/table.h"
#include "cpu/memory.h"
#include "cpu/thread_pool.h"

namespace qvl::cpu {

struct Context {
  const Kernels& kernels;
  ThreadPool pool;
  Buffer activations;             // of linear(): prepared or packed
  std::vector<Buffer> of_thread;  // of linear() and attention, one a thread

  Context(const Kernels& kernels, int n_threads)
      : kernels(kernels), pool(n_threads), of_thread(static_cast<size_t>(n_threads)) {}

  // body(i, thread) for i below n; in the calling thread alone if there is little to do.
  template <typename Body>
  void rows(int64_t n, Body&& body) {
    if (n < 4) {
      for (int64_t i = 0; i < n; ++i) body(i, 0);
    } else {
      pool.run(n, body);
    }
  }
};

}  // namespace qvl::cpu
