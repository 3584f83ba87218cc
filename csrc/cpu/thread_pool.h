// Threads that wait for loops to share. One caller at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace qvl::cpu {

class ThreadPool {
 public:
  // `n` threads, the calling one included.
  explicit ThreadPool(int n);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // body(task, thread) for tasks 0 to n - 1; thread 0 is the caller. Each thread has a stretch of
  // neighbouring tasks, which it takes in order, so that it knows what memory it reads next; then it helps
  // with the others'. Returns when all are done. `body` must not throw.
  template <typename Body>
  void run(int64_t n, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_erased(
        n, [](void* context, int64_t task, int thread) { (*static_cast<Plain*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Function = void (*)(void*, int64_t, int);

  void run_erased(int64_t n, Function function, void* context);
  void work(int thread);
  void take_tasks(int thread);
  void join();

  // A thread's stretch of the tasks, on a cache line of its own.
  struct alignas(64) Stretch {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  // The loop that is shared now.
  Function function_ = nullptr;
  void* context_ = nullptr;
  std::vector<Stretch> stretches_;
  // A new loop raises the generation; workers count themselves off when they have no more to do in it.
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

// Threads to use: `asked` if it is over 0, else OMP_NUM_THREADS, else the CPUs that this process may run on.
int thread_count(int asked);

}  // namespace qvl::cpu
