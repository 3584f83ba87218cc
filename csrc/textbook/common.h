// Helpers shared by the versions: conversion of single bfloat16 values, and vectors for rows of any length.
#pragma once

#include "cpu/kernels/simd.h"

namespace {

// Convert a bfloat16, the upper half of a float32.
QVL_INLINE float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// Call body(i, some) for each vector of n values: it starts at value i and has `some` of kLanes values.
template <typename Body>
QVL_INLINE void each_vector(int n, Body&& body) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

// Load the first `some` values; the other lanes are zero.
QVL_INLINE Floats some_of(const BFloat16* memory, int some) {
  return some == kLanes ? load_floats(memory) : load_some(memory, some);
}
QVL_INLINE Floats some_of(const float* memory, int some) {
  return some == kLanes ? load<Floats>(memory) : load_some(memory, some);
}

}  // namespace
