// Conversion of the caller's structs and arrays of structs, possibly of an older or newer version, to the
// current layout, that of the qwenvl.h with which this library is built.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "qwenvl.h"

namespace qvl {

// Size of a struct, in bytes, in the version that introduced it.
template <typename T>
constexpr uint32_t kFirstSize = 0;
template <>
inline constexpr uint32_t kFirstSize<qvl_config> = 104;
template <>
inline constexpr uint32_t kFirstSize<qvl_batch> = 40;
template <>
inline constexpr uint32_t kFirstSize<qvl_sequence> = 24;
template <>
inline constexpr uint32_t kFirstSize<qvl_span> = 16;
template <>
inline constexpr uint32_t kFirstSize<qvl_sampling> = 56;
template <>
inline constexpr uint32_t kFirstSize<qvl_tensor> = 72;
template <>
inline constexpr uint32_t kFirstSize<qvl_adapter_matrix> = 56;
template <>
inline constexpr uint32_t kFirstSize<qvl_step_args> = 80;
template <>
inline constexpr uint32_t kFirstSize<qvl_request> = 48;
template <>
inline constexpr uint32_t kFirstSize<qvl_device_info> = 200;

// A size may be larger than the struct is here, because a newer version may have more fields; over this
// limit it is taken for uninitialised.
constexpr uint32_t kMaxStructSize = 4096;

// Check the size of a struct or the stride of an array, which the caller has set. `where` and `field`: names
// of the struct or array and of its size, for messages.
template <typename T>
void check_size(const char* where, const char* field, uint32_t size) {
  QVL_REQUIRE(size >= kFirstSize<T> && size <= kMaxStructSize, QVL_INVALID,
              "%s: %s is %u; it must be %u to %u (%zu in this version)", where, field, size, kFirstSize<T>,
              kMaxStructSize, sizeof(T));
}

// Copy in the current layout of the struct at `from`, which begins with its size.
template <typename T>
T converted(const char* where, const T* from) {
  QVL_REQUIRE(from != nullptr, QVL_INVALID, "%s is NULL", where);
  uint32_t size;
  std::memcpy(&size, from, sizeof size);
  check_size<T>(where, "size", size);
  T to{};
  std::memcpy(&to, from, std::min<size_t>(size, sizeof to));
  return to;
}

// Array of structs in the current layout: the caller's array, which must outlive this object, if it has this
// layout, else a copy.
template <typename T>
class ConvertedArray {
 public:
  // n structs at `from`; NULL stays NULL. A negative n is not refused here, but by the function called next.
  // `where` and `field`: names of the array and of its stride, for messages.
  ConvertedArray(const char* where, const char* field, const T* from, int64_t n, uint32_t stride)
      : data_(from) {
    if (n <= 0 || from == nullptr) return;
    check_size<T>(where, field, stride);
    if (stride == sizeof(T)) return;
    copies_.resize(static_cast<size_t>(n));
    const char* at = reinterpret_cast<const char*>(from);
    for (T& copy : copies_) {
      std::memcpy(&copy, at, std::min<size_t>(stride, sizeof copy));
      at += stride;
    }
    data_ = copies_.data();
  }
  ConvertedArray(const ConvertedArray&) = delete;
  ConvertedArray& operator=(const ConvertedArray&) = delete;

  const T* data() const { return data_; }

 private:
  const T* data_;
  std::vector<T> copies_;
};

// Batch with its two arrays in the current layout. A stride of 0, which a batch of version 0.1 has because it
// lacks the field, is that of version 0.1.
class ConvertedBatch {
 public:
  explicit ConvertedBatch(const qvl_batch* from)
      : batch_(converted("batch", from)),
        sequences_("batch", "sequence_size", batch_.sequences,
                   checked_count(batch_.n_sequences, "n_sequences"),
                   batch_.sequence_size ? batch_.sequence_size : kFirstSize<qvl_sequence>),
        spans_("batch", "span_size", batch_.spans, checked_count(batch_.n_spans, "n_spans"),
               batch_.span_size ? batch_.span_size : kFirstSize<qvl_span>) {
    batch_.sequences = sequences_.data();
    batch_.spans = spans_.data();
    batch_.sequence_size = sizeof(qvl_sequence);
    batch_.span_size = sizeof(qvl_span);
  }

  const qvl_batch& get() const { return batch_; }

 private:
  // Check the number of elements before the array is copied: an invalid one would make the copy too large.
  static int64_t checked_count(int32_t n, const char* name) {
    QVL_REQUIRE(n <= (1 << 20), QVL_INVALID, "batch: %s is %d; it must be at most %d", name, n, 1 << 20);
    return n;
  }

  qvl_batch batch_;
  ConvertedArray<qvl_sequence> sequences_;
  ConvertedArray<qvl_span> spans_;
};

}  // namespace qvl
