// Storage types of matrices; qwenvl.h documents the formats.
#pragma once

#include <cstdint>

#include "qwenvl.h"

namespace qvl {

constexpr int64_t kPackUnit = 128;  // rows of quantized matrices are padded to a multiple of this

// Length of a padded row.
inline int64_t padded(int64_t in) {
  return (in + kPackUnit - 1) / kPackUnit * kPackUnit;
}

// Number of values that share a scale; 0 for types with one scale per row or without scales.
inline int group_size(qvl_dtype dtype) {
  switch (dtype) {
    case QVL_UINT4_G32:
    case QVL_UINT8_G32:
      return 32;
    case QVL_INT4_G64:
    case QVL_UINT4_G64:
    case QVL_UINT8_G64:
      return 64;
    case QVL_INT4_G128:
    case QVL_UINT4_G128:
    case QVL_UINT8_G128:
      return 128;
    default:
      return 0;
  }
}

// Bits per stored value, without scales; 0 for an unknown type.
inline int value_bits(qvl_dtype dtype) {
  // In the order of qvl_dtype.
  constexpr int kBits[QVL_DTYPES] = {32, 16, 8, 4, 4, 16, 4, 4, 4, 8, 8, 8, 32};
  return dtype >= 0 && dtype < QVL_DTYPES ? kBits[dtype] : 0;
}

inline bool is_float(qvl_dtype dtype) {
  return dtype == QVL_FLOAT32 || dtype == QVL_BFLOAT16 || dtype == QVL_FLOAT16;
}

inline bool has_zeros(qvl_dtype dtype) {
  return dtype >= QVL_UINT4_G32 && dtype <= QVL_UINT8_G128;
}

inline bool is_quantized(qvl_dtype dtype) {
  return dtype == QVL_INT8 || group_size(dtype) != 0;
}

// Bytes of a matrix's values, without scales; the scales follow at this offset. 0 for invalid arguments.
uint64_t value_bytes(qvl_dtype dtype, int64_t out, int64_t in);

// Bytes of the scales. Zero points, if the type has them, follow the scales and have the same size.
uint64_t scale_bytes(qvl_dtype dtype, int64_t out, int64_t in);

// The functions behind qvl_packed_bytes, qvl_pack, qvl_pack_groups and qvl_unpack (qwenvl.h). pack() is not
// for types with zero points, pack_groups() is only for those types, and only packed_bytes() is for
// QVL_INT32.
uint64_t packed_bytes(qvl_dtype dtype, int64_t out, int64_t in);

void pack(qvl_dtype dtype, int64_t out, int64_t in, const float* values, void* packed);

void pack_groups(qvl_dtype dtype, int64_t out, int64_t in, const uint8_t* integers, const uint16_t* scales,
                 const uint16_t* zeros, void* packed);

void unpack(qvl_dtype dtype, int64_t out, int64_t in, const void* packed, float* values);

}  // namespace qvl
