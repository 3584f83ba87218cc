#include "cuda/upload.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <system_error>
#include <thread>

#include "cuda/gpu.h"

namespace qvl::cuda {
namespace {

constexpr uint64_t kChunkBytes = 8 << 20;  // page-locked memory of a slot
constexpr size_t kWorkers = 6;             // threads: one copies 5 to 10 GB/s, the bus 25 to 55 GB/s

}  // namespace

Uploader::Uploader(CUcontext context, CUstream stream) : context_(context), stream_(stream) {
  const size_t n = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, kWorkers);
  for (size_t i = 0; i < n; ++i) {
    auto worker = std::make_unique<Worker>();
    check(driver().cuStreamCreate(&worker->stream, kNonBlocking), "creating a stream");
    for (Slot& slot : worker->slots) slot.memory = HostMemory(kChunkBytes);
    workers_.push_back(std::move(worker));
  }
}

Uploader::~Uploader() {
  for (auto& worker : workers_) {
    driver().cuStreamSynchronize(worker->stream);
    driver().cuStreamDestroy(worker->stream);
  }
}

void Uploader::copy(void* to, const void* from, uint64_t bytes) {
  // Work enqueued earlier on the stream may still read the memory at `to`.
  earlier_work_.record(stream_);
  const uint64_t chunks = (bytes + kChunkBytes - 1) / kChunkBytes;
  const size_t n = static_cast<size_t>(std::min<uint64_t>(workers_.size(), chunks));
  std::vector<std::exception_ptr> errors(n);
  const auto run = [&](size_t i) {
    try {
      const CurrentContext current(context_);
      const uint64_t first = chunks * i / n * kChunkBytes,
                     end = std::min(bytes, chunks * (i + 1) / n * kChunkBytes);
      copy_part(*workers_[i], static_cast<char*>(to) + first, static_cast<const char*>(from) + first,
                end - first);
    } catch (...) {
      errors[i] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(n);
  size_t started = 1;
  try {
    for (; started < n; ++started) threads.emplace_back(run, started);
  } catch (const std::system_error&) {
    // No further thread can be created: this one also copies the other parts.
  }
  if (n > 0) run(0);
  for (size_t i = started; i < n; ++i) run(i);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  for (size_t i = 0; i < n; ++i) workers_[i]->finished.hold(stream_);
}

void Uploader::copy_part(Worker& worker, char* to, const char* from, uint64_t bytes) {
  earlier_work_.hold(worker.stream);
  for (uint64_t offset = 0; offset < bytes; offset += kChunkBytes) {
    const uint64_t chunk = std::min(kChunkBytes, bytes - offset);
    Slot& slot = worker.slots[worker.next++ % worker.slots.size()];
    slot.copied.wait();
    std::memcpy(slot.memory.get(), from + offset, chunk);
    cuda::copy(worker.stream, to + offset, slot.memory.get(), chunk);
    slot.copied.record(worker.stream);
  }
  worker.finished.record(worker.stream);
}

}  // namespace qvl::cuda
