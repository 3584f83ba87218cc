// Aligned memory and scratch buffers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qvl::cpu {

// Convert a count, which must not be negative, to size_t.
inline size_t size(int64_t n) {
  return static_cast<size_t>(n);
}

// Allocate memory aligned to a cache line. Memory of at least two huge pages is aligned to a huge page, which
// saves TLB misses.
inline void* allocate(size_t bytes) {
  constexpr size_t kHugePage = size_t{1} << 21;
  const size_t unit = bytes >= 2 * kHugePage ? kHugePage : 64;
  const size_t padded = (bytes + unit - 1) / unit * unit;
  void* memory = padded >= bytes ? std::aligned_alloc(unit, padded > 0 ? padded : unit) : nullptr;
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (unit == kHugePage) madvise(memory, padded, MADV_HUGEPAGE);  // a hint only
#endif
  return memory;
}

// Memory that grows on demand and never shrinks. It loses its content if it grows.
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

  // Memory for n values. get(0) returns the memory of the last call, with its content.
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
