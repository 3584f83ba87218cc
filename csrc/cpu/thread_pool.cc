#include "cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/error.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qvl::cpu {
namespace {

// About 50 microseconds of spinning before a worker sleeps, longer than the gaps between a decode step's
// loops.
constexpr int kSpins = 2000;

// Times in nanoseconds; kAlone and kMostAlone are factors. When several threads have lost more than
// kTolerated compared with one, loops run single-threaded for alone_ times that loss, at most a second, and
// alone_ doubles: if another process always occupies a processor, almost no time is lost. Gains count up to
// kCredit, enough for a processor that is occupied occasionally; then alone_ is reset to kAlone.
constexpr int64_t kTolerated = 50000;
constexpr int64_t kCredit = 2000000;
constexpr int64_t kAlone = 32, kMostAlone = 1 << 14;
constexpr int64_t kLongestAlone = 1000000000;
// A worker that spins for longer than this has been preempted.
constexpr int64_t kPreempted = 500000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Number of forks between the process that loaded the library and this one.
std::atomic<uint32_t> forks{0};

void count_forks() {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
#endif
}

}  // namespace

// The threads and their current loop. On the heap, because a child process after fork() must leak its
// parent's Team: the threads do not exist in the child and cannot be joined, and the destructor of a
// condition variable on which they sleep would wait for them.
struct ThreadPool::Team {
  // A thread's range of tasks, on a separate cache line. The upper half of a ticket is the number of the
  // loop, the lower half the number of tasks left: a late worker finds the number of a later loop and takes
  // no task. The caller waits while a ticket of its loop can be taken, so all that a thread reads between its
  // first load of the number and taking a ticket belongs to that loop.
  struct alignas(64) TaskRange {
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> end{0};
  };

  explicit Team(int n) : forked(forks.load()), ranges(static_cast<size_t>(n)) {
    workers.reserve(static_cast<size_t>(n));
    try {
      for (int i = 1; i < n; ++i) workers.emplace_back([this, i] { work(i); });
    } catch (const std::system_error& e) {
      join();
      fail(QVL_NO_MEMORY, "config: cannot start %d threads: %s", n, e.what());
    }
  }

  void join() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      stop.store(true);
      loop.fetch_add(1);
    }
    wake.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  // Publish n tasks to the threads; take_tasks() and the wait for `left` must follow.
  void publish(int64_t n, Function body, void* with) {
    function.store(body, std::memory_order_relaxed);
    context.store(with, std::memory_order_relaxed);
    left.store(n, std::memory_order_relaxed);
    const uint32_t number = loop.load(std::memory_order_relaxed) + 1;
    const auto threads = static_cast<int64_t>(ranges.size());
    for (int64_t i = 0; i < threads; ++i) {
      TaskRange& range = ranges[static_cast<size_t>(i)];
      const int64_t first = n * i / threads, end = n * (i + 1) / threads;
      range.end.store(end, std::memory_order_relaxed);
      range.ticket.store(uint64_t{number} << 32 | static_cast<uint64_t>(end - first),
                         std::memory_order_release);
    }
    loop.store(number);
    // Resetting the count saves the next loop a system call if the notified threads have not started yet.
    if (sleepers.load() == 0) return;
    sleepers.store(0);
    // The empty critical section orders this with a worker between its last check and its sleep.
    {
      const std::lock_guard<std::mutex> lock(mutex);
    }
    wake.notify_all();
  }

  // Run tasks of loop `number` until none is left; returns the number taken.
  int64_t take_tasks(uint32_t number, int thread) {
    const Function body = function.load(std::memory_order_relaxed);
    void* const with = context.load(std::memory_order_relaxed);
    const size_t n = ranges.size();
    int64_t taken = 0;
    for (size_t i = 0; i < n; ++i) {
      TaskRange& range = ranges[(static_cast<size_t>(thread) + i) % n];
      uint64_t ticket = range.ticket.load(std::memory_order_acquire);
      while (ticket >> 32 == number && static_cast<uint32_t>(ticket) != 0) {
        const int64_t task =
            range.end.load(std::memory_order_relaxed) - static_cast<int64_t>(static_cast<uint32_t>(ticket));
        if (!range.ticket.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                                std::memory_order_acquire)) {
          continue;
        }
        body(with, task, thread);
        ++taken;
        --ticket;
      }
    }
    if (taken > 0) left.fetch_sub(taken, std::memory_order_acq_rel);
    return taken;
  }

  void wait() const {
    for (int spins = 0; left.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  void work(int thread) {
    uint32_t seen = 0;
    while (true) {
      const int64_t start = now();
      int spins = 0;
      while (loop.load() == seen && ++spins < kSpins) pause();
      const int64_t spun = now() - start;
      if (spun > kPreempted) preempted.fetch_add(spun, std::memory_order_relaxed);
      if (loop.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        // Count this thread before the last check, and again after each wake-up, which resets the count.
        while (true) {
          sleepers.fetch_add(1);
          if (loop.load() != seen) break;
          wake.wait(lock);
        }
      }
      seen = loop.load();
      if (stop.load()) return;
      take_tasks(seen, thread);
    }
  }

  const uint32_t forked;  // `forks` when the threads were started
  std::vector<TaskRange> ranges;
  std::atomic<Function> function{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int64_t> left{0};  // tasks not done yet
  std::atomic<uint32_t> loop{0};
  std::atomic<bool> stop{false};
  std::atomic<int> sleepers{0};
  std::atomic<int64_t> preempted{0};  // nanoseconds that workers were preempted while spinning
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;
};

ThreadPool::ThreadPool(int n) : n_threads_(n), alone_(kAlone) {
  count_forks();
  team_ = std::make_unique<Team>(n);
}

ThreadPool::~ThreadPool() {
  if (team_ != nullptr && team_->forked == forks.load()) {
    team_->join();
  } else {
    (void)team_.release();
  }
}

bool ThreadPool::alone() {
  if (alone_until_ == 0) return false;
  if (now() < alone_until_) return true;
  alone_until_ = 0;
  return false;
}

void ThreadPool::run_erased(int64_t n, Function function, void* context) {
  if (n_threads_ == 1 || n <= 1 || n > INT32_MAX || alone()) {
    for (int64_t task = 0; task < n; ++task) function(context, task, 0);
    return;
  }
  if (team_ == nullptr || team_->forked != forks.load(std::memory_order_relaxed)) {
    (void)team_.release();
    team_ = std::make_unique<Team>(n_threads_);
  }
  const int64_t start = now();
  team_->publish(n, function, context);
  const int64_t published = now();
  const int64_t taken = team_->take_tasks(team_->loop.load(std::memory_order_relaxed), 0);
  const int64_t finished = now();
  team_->wait();
  if (team_->preempted.load(std::memory_order_relaxed) > 0) debt_ += team_->preempted.exchange(0);
  // Time of this loop minus the estimated single-threaded time, extrapolated from the caller's tasks.
  const int64_t loss = taken > 0 ? now() - start - (finished - published) * n / taken : 0;
  debt_ = std::max(-kCredit, debt_ + loss);
  if (debt_ == -kCredit) alone_ = kAlone;
  if (debt_ <= kTolerated) return;
  alone_until_ = now() + std::min(alone_ * debt_, kLongestAlone);
  alone_ = std::min(2 * alone_, kMostAlone);
  debt_ = 0;
}

int thread_count(int requested) {
  if (requested > 0) return requested;
  const char* variable = std::getenv("OMP_NUM_THREADS");
  const int set = variable != nullptr ? std::atoi(variable) : 0;
  if (set > 0 && set <= 1024) return set;
  const unsigned all = std::thread::hardware_concurrency();
  int n = all > 0 ? static_cast<int>(all) : 1;
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) n = CPU_COUNT(&cpus);
  const double quota = cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup");
  if (quota > 0 && quota < n) n = static_cast<int>(std::ceil(quota));
#endif
  return n;
}

}  // namespace qvl::cpu
