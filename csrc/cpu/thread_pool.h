// Threads that wait for loops to share. One caller at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

namespace qvl::cpu {

class ThreadPool {
 public:
  // `n` threads, the calling one included.
  explicit ThreadPool(int n);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int size() const { return n_threads_; }

  // body(task, thread) for tasks 0 to n - 1; thread 0 is the caller. Each thread has a stretch of
  // neighbouring tasks, which it takes in order, so that it knows what memory it reads next; then it helps
  // with the others'. Returns when all are done. `body` must not throw.
  //
  // Only threads that have begun a task are waited for. Where waiting has cost more than the caller alone
  // would have needed, because another process has a thread's processor, the caller runs alone for a while.
  // In a child after fork() the first loop starts fresh threads, and fails like the constructor if it cannot.
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
  int64_t debt_ = 0;         // nanoseconds that sharing has lost against running alone; negative: gained
  int64_t alone_;            // how many times as long the next debt is made up for
  int64_t alone_until_ = 0;  // nanoseconds of the steady clock; 0: now
};

// Threads to use: `asked` if it is over 0, else OMP_NUM_THREADS, else the CPUs that this process may run on,
// by its affinity and by the quota of its container.
int thread_count(int asked);

// CPUs that the control groups listed in `cgroup_file` (/proc/self/cgroup) and their parents allow, 0 if they
// set no limit. `root` is where the groups are mounted (/sys/fs/cgroup). Versions 1 and 2.
double cpu_quota(const std::string& cgroup_file, const std::string& root);

}  // namespace qvl::cpu
