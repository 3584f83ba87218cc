// Conversion of callers' structs and arrays of structs to the current layout.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "qwenvl.h"

namespace qvl {

// Size of a struct in the version that introduced it.
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

template <typename T>
void check_size(const char* where, const char* field, uint32_t size) {
  QVL_REQUIRE(size >= kFirstSize<T> && size <= 4096, QVL_INVALID, "%s: %s is %u; it must be %zu", where,
              field, size, sizeof(T));
}

// Copy the struct at `from`, which begins with its size.
template <typename T>
T fitted(const char* where, const T* from) {
  QVL_REQUIRE(from != nullptr, QVL_INVALID, "%s is NULL", where);
  uint32_t size;
  std::memcpy(&size, from, sizeof size);
  check_size<T>(where, "size", size);
  T to{};
  std::memcpy(&to, from, std::min<size_t>(size, sizeof to));
  return to;
}

// Array of structs in the current layout: the caller's memory if its stride is the current one, else a copy.
template <typename T>
class Fitted {
 public:
  // `n` structs at `from`; NULL stays NULL. `what` names the array, `field` its stride.
  Fitted(const char* what, const char* field, const T* from, int64_t n, uint32_t stride) : data_(from) {
    if (n <= 0 || from == nullptr) return;
    check_size<T>(what, field, stride);
    if (stride == sizeof(T)) return;
    copies_.resize(static_cast<size_t>(n));
    const char* at = reinterpret_cast<const char*>(from);
    for (T& copy : copies_) {
      std::memcpy(&copy, at, std::min<size_t>(stride, sizeof copy));
      at += stride;
    }
    data_ = copies_.data();
  }
  Fitted(const Fitted&) = delete;
  Fitted& operator=(const Fitted&) = delete;

  const T* data() const { return data_; }

 private:
  const T* data_;
  std::vector<T> copies_;
};

// Batch with its two arrays in the current layout.
class FittedBatch {
 public:
  explicit FittedBatch(const qvl_batch* from)
      : batch_(fitted("batch", from)),
        sequences_("batch", "sequence_size", batch_.sequences, checked(batch_.n_sequences, "n_sequences"),
                   batch_.sequence_size ? batch_.sequence_size : kFirstSize<qvl_sequence>),
        spans_("batch", "span_size", batch_.spans, checked(batch_.n_spans, "n_spans"),
               batch_.span_size ? batch_.span_size : kFirstSize<qvl_span>) {
    batch_.sequences = sequences_.data();
    batch_.spans = spans_.data();
    batch_.sequence_size = sizeof(qvl_sequence);
    batch_.span_size = sizeof(qvl_span);
  }

  const qvl_batch& get() const { return batch_; }

 private:
  // Checked before the copy, which an invalid number would make too large.
  static int64_t checked(int32_t n, const char* name) {
    QVL_REQUIRE(n <= (1 << 20), QVL_INVALID, "batch: %s is %d; it must be at most %d", name, n, 1 << 20);
    return n;
  }

  qvl_batch batch_;
  Fitted<qvl_sequence> sequences_;
  Fitted<qvl_span> spans_;
};

}  // namespace qvl
