#include "cpu/thread_pool.h"

#include <cstdlib>
#include <system_error>

#include "core/error.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qvl::cpu {
namespace {

// About 50 microseconds: the loops of a decode step follow each other in less, and an idle engine then
// sleeps.
constexpr int kSpins = 2000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int n) : stretches_(static_cast<size_t>(n)) {
  workers_.reserve(static_cast<size_t>(n));
  try {
    for (int i = 1; i < n; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error& e) {
    join();
    fail(QVL_NO_MEMORY, "config: cannot start %d threads: %s", n, e.what());
  }
}

ThreadPool::~ThreadPool() {
  join();
}

void ThreadPool::join() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::take_tasks(int thread) {
  const size_t n = stretches_.size();
  for (size_t i = 0; i < n; ++i) {
    Stretch& stretch = stretches_[(static_cast<size_t>(thread) + i) % n];
    for (int64_t task = stretch.next.fetch_add(1); task < stretch.end; task = stretch.next.fetch_add(1)) {
      function_(context_, task, thread);
    }
  }
}

void ThreadPool::run_erased(int64_t n, Function function, void* context) {
  if (workers_.empty() || n <= 1) {
    for (int64_t task = 0; task < n; ++task) function(context, task, 0);
    return;
  }
  function_ = function;
  context_ = context;
  const auto threads = static_cast<int64_t>(stretches_.size());
  for (int64_t i = 0; i < threads; ++i) {
    Stretch& stretch = stretches_[static_cast<size_t>(i)];
    stretch.next.store(n * i / threads);
    stretch.end = n * (i + 1) / threads;
  }
  busy_.store(static_cast<int>(workers_.size()));
  generation_.fetch_add(1);
  if (sleepers_.load() > 0) {
    // The empty section orders this with a worker that is between its last look and its sleep.
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }
  take_tasks(0);
  for (int spins = 0; busy_.load() > 0; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  while (true) {
    int spins = 0;
    while (generation_.load() == seen && ++spins < kSpins) pause();
    if (generation_.load() == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      sleepers_.fetch_sub(1);
    }
    ++seen;
    if (stop_.load()) return;
    take_tasks(thread);
    busy_.fetch_sub(1);
  }
}

int thread_count(int asked) {
  if (asked > 0) return asked;
  const char* variable = std::getenv("OMP_NUM_THREADS");
  const int set = variable != nullptr ? std::atoi(variable) : 0;
  if (set > 0 && set <= 1024) return set;
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? static_cast<int>(n) : 1;
}

}  // namespace qvl::cpu
