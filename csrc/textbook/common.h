// Helpers shared by the versions of all kernels: conversion of single bfloat16 values, and loops and loads of
// vectors for rows whose length is not a multiple of kLanes.
#pragma once

#include "cpu/kernels/simd.h"

namespace {

// Convert a bfloat16, which is the upper half of a float32, to float32.
QVL_INLINE float to_float(uint16_t bits) {
  const uint32_t float_bits = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &float_bits, sizeof value);
  return value;
}

// Split n values into vectors of kLanes. Call body(i, count) for each vector: i is the index of its first
// value; count is kLanes, or less in the last vector.
template <typename Body>
QVL_INLINE void each_vector(int n, Body&& body) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

// Load `count` values into the first lanes; the other lanes are zero.
QVL_INLINE Floats load_elements(const BFloat16* memory, int count) {
  return count == kLanes ? load_floats(memory) : load_first(memory, count);
}
QVL_INLINE Floats load_elements(const float* memory, int count) {
  return count == kLanes ? load<Floats>(memory) : load_first(memory, count);
}

}  // namespace
