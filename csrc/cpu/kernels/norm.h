// Norms with statistics in float32, one row at a time.
#pragma once

#include "cpu/kernels/simd.h"

namespace {

template <typename Body>
QVL_INLINE void each_vector(int n, Body&& body) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

// Deviation from `centre`, squared and summed; lanes behind the end do not count.
QVL_INLINE float sum_of_squares(const float* x, int n, float centre) {
  Floats total{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats d = load<Floats>(x + i) - centre;
    total += d * d;
  }
  float rest = 0;
  for (; i < n; ++i) rest += (x[i] - centre) * (x[i] - centre);
  return sum(total) + rest;
}

void rms_norm(const float* x, const float* weight, int n, float epsilon, float* y) {
  const float mean = sum_of_squares(x, n, 0) / static_cast<float>(n);
  const float scale = 1.0F / __builtin_sqrtf(mean + epsilon);
  each_vector(n, [&](int i, int some) {
    store_some(y + i, load_some(x + i, some) * scale * load_some(weight + i, some), some);
  });
}

void layer_norm(const float* x, const float* weight, const float* bias, int n, float epsilon, float* y) {
  Floats total{};
  each_vector(n, [&](int i, int some) { total += load_some(x + i, some); });
  const float mean = sum(total) / static_cast<float>(n);
  const float variance = sum_of_squares(x, n, mean) / static_cast<float>(n);
  const float scale = 1.0F / __builtin_sqrtf(variance + epsilon);
  each_vector(n, [&](int i, int some) {
    const Floats normed = (load_some(x + i, some) - mean) * scale;
    store_some(y + i, normed * load_some(weight + i, some) + load_some(bias + i, some), some);
  });
}

}  // namespace
