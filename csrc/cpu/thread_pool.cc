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
#include "cpu/control_groups.h"

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

// Spins, about 50 microseconds, before a worker sleeps or the waiting caller begins to yield: longer than the
// gaps between a decode step's loops.
constexpr int kSpins = 2000;

// Single-threaded periods; all times are in nanoseconds. The loss of a loop on several threads is its time
// minus its estimated time on one thread; a negative loss is a gain. When the sum of the losses exceeds
// kToleratedLoss, loops run single-threaded for single_threaded_factor_ times the sum, at most for
// kMaxSingleThreaded, and the factor doubles, up to kMaxFactor: if another process always occupies a
// processor, almost no time is lost. Gains compensate later losses, but only up to kMaxGain, which is enough
// for a processor that is occupied occasionally. When the gains reach kMaxGain, the factor is reset to
// kMinFactor.
constexpr int64_t kToleratedLoss = 50000;
constexpr int64_t kMaxGain = 2000000;
constexpr int64_t kMinFactor = 32, kMaxFactor = 1 << 14;
constexpr int64_t kMaxSingleThreaded = 1000000000;
// A worker that spins for longer than this many nanoseconds, ten times the duration of kSpins, has been
// preempted by another process. The time of such spins is added to the sum of the losses.
constexpr int64_t kPreemptedSpin = 500000;

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

// Number of forks between the process that created the first pool and this one.
std::atomic<uint32_t> forks{0};

// Count forks from now on.
void count_forks() {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
#endif
}

}  // namespace

// The threads and their current loop. This object is on the heap because a child process after fork() must
// leak the Workers of its parent: the threads do not exist in the child and cannot be joined, and the
// destructor of the condition variable on which they slept would wait for them.
struct ThreadPool::Workers {
  // A thread's range of tasks, on a separate cache line. The upper half of a ticket is the number of the
  // loop, the lower half the number of remaining tasks. A worker that starts late finds the number of a later
  // loop and takes no task. The caller does not return while a task of its loop can be taken. Everything that
  // a thread reads between its first load of the loop number and taking a task thus belongs to that loop.
  struct alignas(64) TaskRange {
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> end{0};  // the next task is `end` minus the number of remaining tasks
  };

  explicit Workers(int n) : forks_at_start(forks.load()), ranges(static_cast<size_t>(n)) {
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

  // Publish n tasks to the threads; take_tasks() and wait() must follow.
  void publish(int64_t n, Function new_function, void* new_context) {
    function.store(new_function, std::memory_order_relaxed);
    context.store(new_context, std::memory_order_relaxed);
    remaining.store(n, std::memory_order_relaxed);
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
    // With the count reset to 0, the next loop makes no system call if the notified threads have not started
    // yet.
    if (sleepers.load() == 0) return;
    sleepers.store(0);
    // The empty critical section waits for a worker that is between its last check and its sleep: that worker
    // would otherwise miss the notification.
    {
      const std::lock_guard<std::mutex> lock(mutex);
    }
    wake.notify_all();
  }

  // Run tasks of loop `number` until none remain. Returns how many tasks this thread has run.
  int64_t take_tasks(uint32_t number, int thread) {
    const Function body = function.load(std::memory_order_relaxed);
    void* const argument = context.load(std::memory_order_relaxed);
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
        body(argument, task, thread);
        ++taken;
        --ticket;
      }
    }
    if (taken > 0) remaining.fetch_sub(taken, std::memory_order_acq_rel);
    return taken;
  }

  // Wait until all tasks of the loop are done.
  void wait() const {
    for (int spins = 0; remaining.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  // Body of a worker thread.
  void work(int thread) {
    uint32_t last_loop = 0;
    while (true) {
      const int64_t start = now();
      int spins = 0;
      while (loop.load() == last_loop && ++spins < kSpins) pause();
      const int64_t spun = now() - start;
      if (spun > kPreemptedSpin) preempted.fetch_add(spun, std::memory_order_relaxed);
      if (loop.load() == last_loop) {
        std::unique_lock<std::mutex> lock(mutex);
        // Count this thread before the last check, and again after each wake-up, because publish() has reset
        // the count.
        while (true) {
          sleepers.fetch_add(1);
          if (loop.load() != last_loop) break;
          wake.wait(lock);
        }
      }
      last_loop = loop.load();
      if (stop.load()) return;
      take_tasks(last_loop, thread);
    }
  }

  const uint32_t forks_at_start;  // `forks` when the threads were started
  std::vector<TaskRange> ranges;
  std::atomic<Function> function{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int64_t> remaining{0};  // tasks not done yet
  std::atomic<uint32_t> loop{0};      // number of the current loop
  std::atomic<bool> stop{false};
  std::atomic<int> sleepers{0};       // workers that sleep or are about to, since the count was last reset
  std::atomic<int64_t> preempted{0};  // nanoseconds that workers were preempted while spinning
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;
};

ThreadPool::ThreadPool(int n) : n_threads_(n), single_threaded_factor_(kMinFactor) {
  count_forks();
  workers_ = std::make_unique<Workers>(n);
}

ThreadPool::~ThreadPool() {
  if (workers_ != nullptr && workers_->forks_at_start == forks.load()) {
    workers_->join();
  } else {
    (void)workers_.release();
  }
}

bool ThreadPool::runs_single_threaded() {
  if (single_threaded_until_ == 0) return false;
  if (now() < single_threaded_until_) return true;
  single_threaded_until_ = 0;
  return false;
}

void ThreadPool::run_erased(int64_t n, Function function, void* context) {
  // A ticket counts tasks in 32 bits.
  if (n_threads_ == 1 || n <= 1 || n > INT32_MAX || runs_single_threaded()) {
    for (int64_t task = 0; task < n; ++task) function(context, task, 0);
    return;
  }
  if (workers_ == nullptr || workers_->forks_at_start != forks.load(std::memory_order_relaxed)) {
    (void)workers_.release();
    workers_ = std::make_unique<Workers>(n_threads_);
  }
  const int64_t start = now();
  workers_->publish(n, function, context);
  const int64_t published = now();
  const int64_t taken = workers_->take_tasks(workers_->loop.load(std::memory_order_relaxed), 0);
  const int64_t finished = now();
  workers_->wait();
  if (workers_->preempted.load(std::memory_order_relaxed) > 0) total_loss_ += workers_->preempted.exchange(0);
  // Time of this loop minus the estimated single-threaded time, extrapolated from the caller's tasks.
  const int64_t loss = taken > 0 ? now() - start - (finished - published) * n / taken : 0;
  total_loss_ = std::max(-kMaxGain, total_loss_ + loss);
  if (total_loss_ == -kMaxGain) single_threaded_factor_ = kMinFactor;
  if (total_loss_ <= kToleratedLoss) return;
  single_threaded_until_ = now() + std::min(single_threaded_factor_ * total_loss_, kMaxSingleThreaded);
  single_threaded_factor_ = std::min(2 * single_threaded_factor_, kMaxFactor);
  total_loss_ = 0;
}

int thread_count(int requested) {
  if (requested > 0) return requested;
  const char* variable = std::getenv("OMP_NUM_THREADS");
  const int from_variable = variable != nullptr ? std::atoi(variable) : 0;
  if (from_variable > 0 && from_variable <= 1024) return from_variable;
  const unsigned hardware_threads = std::thread::hardware_concurrency();
  int n = hardware_threads > 0 ? static_cast<int>(hardware_threads) : 1;
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) n = CPU_COUNT(&cpus);
  const double quota = cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup");
  if (quota > 0 && quota < n) n = static_cast<int>(std::ceil(quota));
#endif
  return n;
}

}  // namespace qvl::cpu
