// Storage types of matrices; qwenvl.h documents the formats.
#pragma once

#include <cstdint>

#include "qwenvl.h"

namespace qvl {

constexpr int64_t kPackUnit = 128;  // rows of quantised matrices are padded to this many values

inline int64_t padded(int64_t in) {
  return (in + kPackUnit - 1) / kPackUnit * kPackUnit;
}

// Group size: values that share a scale; 0 for a scale per row and for types without scales.
inline int group_size(qvl_dtype dtype) {
  return dtype == QVL_INT4_G64 ? 64 : dtype == QVL_INT4_G128 ? 128 : 0;
}

inline bool is_quantised(qvl_dtype dtype) {
  return dtype == QVL_INT8 || group_size(dtype) != 0;
}

// Bytes of the values alone: the offset of the scales.
uint64_t value_bytes(qvl_dtype dtype, int64_t out, int64_t in);

uint64_t packed_bytes(qvl_dtype dtype, int64_t out, int64_t in);

void pack(qvl_dtype dtype, int64_t out, int64_t in, const float* values, void* packed);
void unpack(qvl_dtype dtype, int64_t out, int64_t in, const void* packed, float* values);

}  // namespace qvl
