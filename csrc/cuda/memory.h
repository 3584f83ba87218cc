// RAII owners of GPU memory, page-locked host memory and events.
#pragma once

#include <cstdint>
#include <utility>

#include "cuda/driver.h"

namespace qvl::cuda {

inline CUdeviceptr address(const void* memory) {
  return static_cast<CUdeviceptr>(reinterpret_cast<uintptr_t>(memory));
}

inline uint64_t size(int64_t n) {
  return static_cast<uint64_t>(n);
}

inline double gib(uint64_t bytes) {
  return static_cast<double>(bytes) / (1 << 30);
}

inline constexpr uint64_t rounded(uint64_t bytes, uint64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Whether the GPU can access the memory: GPU memory or page-locked host memory.
bool is_device_visible(const void* pointer);

void copy(CUstream stream, void* to, const void* from, uint64_t bytes);

void* allocate(uint64_t bytes);
void* allocate_host(uint64_t bytes);

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

// Event: a point in the work of a stream.
class Mark {
 public:
  Mark();
  ~Mark() { driver().cuEventDestroy(event_); }
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;

  void record(CUstream stream) { check(driver().cuEventRecord(event_, stream), "recording an event"); }
  void wait() { check(driver().cuEventSynchronize(event_), "computing on the GPU"); }
  void order(CUstream later) { check(driver().cuStreamWaitEvent(later, event_, 0), "ordering streams"); }
  bool done();

 private:
  CUevent event_ = nullptr;
};

}  // namespace qvl::cuda
