// Aligned memory, and the buffers that a computation needs besides its inputs and outputs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace qvl::cpu {

inline void* allocate(size_t bytes) {
  const size_t whole = (bytes + 63) / 64 * 64;
  void* memory = whole >= bytes ? std::aligned_alloc(64, whole > 0 ? whole : 64) : nullptr;
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// Memory that grows when asked for more than it has, losing its content, and never shrinks.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) { get<char>(bytes); }
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
    other.bytes_ = 0;
  }
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { std::free(data_); }

  template <typename T>
  T* get(size_t n) {
    const size_t bytes = n * sizeof(T);
    if (bytes > bytes_ || data_ == nullptr) {
      std::free(data_);
      data_ = nullptr;
      bytes_ = 0;
      data_ = allocate(bytes);
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace qvl::cpu
