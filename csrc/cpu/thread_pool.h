// Thread pool for parallel loops. Only one thread at a time may call it.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace qvl::cpu {

class ThreadPool {
 public:
  // n threads, including the calling one. Throws an Error with QVL_NO_MEMORY if a thread cannot be started.
  explicit ThreadPool(int n);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int size() const { return n_threads_; }

  // Call body(task, thread) for tasks 0 to n - 1; thread 0 is the caller. Each thread has a range of
  // consecutive tasks and runs them in order, so that the memory it reads next is predictable. Afterwards it
  // steals tasks of the other threads. Returns when all tasks are done. `body` must not throw.
  //
  // The caller waits only for threads that have begun a task. If another process occupies the processor of a
  // thread, so that loops take longer than on a single thread, the caller runs the next loops
  // single-threaded. In a child process after fork() the first loop starts new threads, and fails like the
  // constructor if it cannot.
  template <typename Body>
  void run(int64_t n, Body&& body) {
    using Callable = std::remove_reference_t<Body>;
    run_erased(
        n, [](void* context, int64_t task, int thread) { (*static_cast<Callable*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Function = void (*)(void*, int64_t, int);
  struct Workers;

  // run() without its template parameter: `function` calls the body, to which `context` points.
  void run_erased(int64_t n, Function function, void* context);
  bool runs_single_threaded();

  int n_threads_;
  std::unique_ptr<Workers> workers_;
  // Nanoseconds lost by using several threads instead of one since the last single-threaded period; negative:
  // gained.
  int64_t total_loss_ = 0;
  // Duration of the next single-threaded period, divided by the loss before it.
  int64_t single_threaded_factor_;
  int64_t single_threaded_until_ = 0;  // end of the period, nanoseconds of the steady clock; 0: none
};

// Number of threads: `requested` if positive, else OMP_NUM_THREADS if it is 1 to 1024, else the CPUs
// available to this process: on Linux within its affinity mask and the quota of its control group, elsewhere
// all hardware threads.
int thread_count(int requested);

}  // namespace qvl::cpu
