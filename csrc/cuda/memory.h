// RAII owners of GPU memory, page-locked host memory and events.
#pragma once

#include <cstdint>
#include <utility>

#include "cuda/driver.h"

namespace qvl::cuda {

// The driver's type of a device address.
inline CUdeviceptr address(const void* memory) {
  return static_cast<CUdeviceptr>(reinterpret_cast<uintptr_t>(memory));
}

// A count as an unsigned size, for products of sizes.
inline uint64_t to_size(int64_t n) {
  return static_cast<uint64_t>(n);
}

// Bytes in GiB, for messages.
inline double gib(uint64_t bytes) {
  return static_cast<double>(bytes) / (1 << 30);
}

// Round up to a multiple of `unit`.
inline constexpr uint64_t round_up(uint64_t n, uint64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Whether the GPU can access the memory: GPU memory or page-locked host memory.
bool is_device_visible(const void* pointer);

// Enqueue a copy; `to` and `from` may each be in GPU memory or in host memory. Pageable host memory at `from`
// may change once this function returns.
void copy(CUstream stream, void* to, const void* from, uint64_t bytes);

// Allocate GPU memory (allocate), or page-locked host memory that the GPU can access (allocate_host). Throw
// QVL_NO_MEMORY if there is too little memory.
void* allocate(uint64_t bytes);
void* allocate_host(uint64_t bytes);

// Owner of memory; see DeviceMemory and HostMemory.
template <void* (*Allocate)(uint64_t), bool kHost>
class Memory {
 public:
  Memory() = default;
  explicit Memory(uint64_t bytes) : data_(bytes ? Allocate(bytes) : nullptr), bytes_(bytes) {}
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory() {
    if (data_ == nullptr) return;
    if (kHost) {
      driver().cuMemFreeHost(data_);
    } else {
      driver().cuMemFree(address(data_));
    }
  }

  uint64_t bytes() const { return bytes_; }
  template <typename T = void>
  T* get() const {
    return static_cast<T*>(data_);
  }

 private:
  void swap(Memory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  void* data_ = nullptr;
  uint64_t bytes_ = 0;
};

using DeviceMemory = Memory<allocate, false>;
using HostMemory = Memory<allocate_host, true>;

// A point in the work of a stream.
class StreamEvent {
 public:
  StreamEvent();
  ~StreamEvent() { driver().cuEventDestroy(event_); }
  StreamEvent(const StreamEvent&) = delete;
  StreamEvent& operator=(const StreamEvent&) = delete;

  void record(CUstream stream) { check(driver().cuEventRecord(event_, stream), "recording an event"); }
  void wait() { check(driver().cuEventSynchronize(event_), "computing on the GPU"); }
  // Make later work on `stream` wait for the event.
  void hold(CUstream stream) { check(driver().cuStreamWaitEvent(stream, event_, 0), "ordering streams"); }
  bool done();

 private:
  CUevent event_ = nullptr;
};

}  // namespace qvl::cuda
