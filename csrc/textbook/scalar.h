// bfloat16 to float32, one value at a time: a bfloat16 is the upper half of a float32.
#pragma once

#include "cpu/kernels/simd.h"

namespace {

QVL_INLINE float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace
