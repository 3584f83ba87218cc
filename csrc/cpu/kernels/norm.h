// RMSNorm and LayerNorm of one row, statistics in float32:
//
//   rms_norm    y = x / sqrt(mean(x^2) + epsilon) * weight
//   layer_norm  y = (x - mean) / sqrt(variance + epsilon) * weight + bias, with a two-pass variance
//
// Layout: x, weight, bias, y float32 [n], any n; y may be x. Each of the L = kLanes lanes has a separate sum
// of d^2, where d is x (rms_norm) or x - mean (layer_norm); sum() adds the lanes in a fixed order:
//
//   x  [ 0 1 .. L-1 | L .. 2L-1 | .. | remainder ]      total[lane] += d * d; the remainder as scalars
//
// Cost. Bytes: x read twice (LayerNorm: three times), weight and bias read once and y written once, 4 * n
// each, in the cache. Operations: 4 * n (LayerNorm: 8 * n). At hidden 4096 a row has 16 KB and the weights of
// a layer 400 MB in bfloat16, so the cost is negligible.
//
// Reference: reference::rms_norm, reference::layer_norm, tests/csrc/test_kernels.py::test_norms.
#pragma once

#include "cpu/kernels/simd.h"

namespace {

// Call body(i, count) for each vector of n values: it begins at value i and has count = kLanes values, or
// fewer at the end.
template <typename Body>
QVL_INLINE void each_vector(int n, Body&& body) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

// Sum of squared deviations from `centre`.
QVL_INLINE float sum_of_squares(const float* x, int n, float centre) {
  Floats total{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats d = load<Floats>(x + i) - centre;
    total += d * d;
  }
  float remainder = 0;
  for (; i < n; ++i) remainder += (x[i] - centre) * (x[i] - centre);
  return sum(total) + remainder;
}

void rms_norm(const float* x, const float* weight, int n, float epsilon, float* y) {
  const float mean_square = sum_of_squares(x, n, /*centre=*/0) / static_cast<float>(n);
  const float scale = 1.0F / __builtin_sqrtf(mean_square + epsilon);
  each_vector(n, [&](int i, int count) {
    store_first(y + i, load_first(x + i, count) * scale * load_first(weight + i, count), count);
  });
}

void layer_norm(const float* x, const float* weight, const float* bias, int n, float epsilon, float* y) {
  Floats total{};
  each_vector(n, [&](int i, int count) { total += load_first(x + i, count); });
  const float mean = sum(total) / static_cast<float>(n);
  const float variance = sum_of_squares(x, n, mean) / static_cast<float>(n);
  const float scale = 1.0F / __builtin_sqrtf(variance + epsilon);
  each_vector(n, [&](int i, int count) {
    const Floats normed = (load_first(x + i, count) - mean) * scale;
    store_first(y + i, normed * load_first(weight + i, count) + load_first(bias + i, count), count);
  });
}

}  // namespace
