// Thread pool for parallel loops. Not for concurrent callers.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

namespace qvl::cpu {

class ThreadPool {
 public:
  // n threads, including the calling one.
  explicit ThreadPool(int n);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int size() const { return n_threads_; }

  // Call body(task, thread) for tasks 0 to n - 1; thread 0 is the caller. Each thread has a range of
  // consecutive tasks and runs them in order, so that the memory it reads next is predictable; then it steals
  // from the other threads. Returns when all tasks are done. `body` must not throw.
  //
  // The caller waits only for threads that have begun a task. If waiting has cost more time than
  // single-threaded execution, because another process occupies a thread's processor, the caller runs loops
  // single-threaded for a while. In a child process after fork() the first loop starts new threads, and fails
  // like the constructor if it cannot.
  template <typename Body>
  void run(int64_t n, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_erased(
        n, [](void* context, int64_t task, int thread) { (*static_cast<Plain*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Function = void (*)(void*, int64_t, int);
  struct Team;

  void run_erased(int64_t n, Function function, void* context);
  bool alone();

  int n_threads_;
  std::unique_ptr<Team> team_;
  int64_t debt_ = 0;         // nanoseconds lost compared with single-threaded execution; negative: gained
  int64_t alone_;            // factor from the next debt to the time of single-threaded execution
  int64_t alone_until_ = 0;  // end of single-threaded execution, nanoseconds of the steady clock; 0: none
};

// Number of threads: `requested` if positive, else OMP_NUM_THREADS, else the CPUs available to this process
// within its affinity mask and the quota of its control group.
int thread_count(int requested);

// CPU quota of the control groups listed in `cgroup_file` (/proc/self/cgroup) and their parents, of cgroup
// version 1 or 2; 0 without a limit. `root`: mount point of the groups (/sys/fs/cgroup).
double cpu_quota(const std::string& cgroup_file, const std::string& root);

}  // namespace qvl::cpu
