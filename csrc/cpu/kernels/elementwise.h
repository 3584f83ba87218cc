// Activations, additions, conversions between storage types and float32, and rotary rotation.
//
// Layout: float32 [n], processed in vectors of L lanes and a remainder of `some` < L values. The rotation
// pairs channel i of the lower half of a head with channel i of its upper half:
//
//   x  [ a0 a1 .. a(d/2-1) | b0 b1 .. b(d/2-1) ]      a' = (a cos - b sin) scale
//                                                     b' = (b cos + a sin) scale
//
// Cost: 1 to 2 reads and 1 write of n values in the cache. gelu and silu_mul need an exponential per value,
// 20 to 30 operations, and are bound by these, not by memory. A matrix product reads thousands of times as
// many bytes.
//
// Reference: reference::gelu, silu_mul, rotary; test_activations, test_bfloat16, test_rotary of
// tests/csrc/test_kernels.py. narrow_all_int8: test_attention with int8 caches.
#pragma once

#include "cpu/kernels/norm.h"
#include "cpu/kernels/simd.h"

namespace {

// x (1 + erf(x / sqrt 2)) / 2, erf after Abramowitz and Stegun 7.1.26: error at most 1.5e-7.
QVL_INLINE Floats gelu_of(Floats x) {
  const Floats z = max(x, -x) * 0.70710678118654752F;
  const Floats t = 1.0F / (1.0F + 0.3275911F * z);
  Floats p = all(1.061405429F);
  p = p * t - 1.453152027F;
  p = p * t + 1.421413741F;
  p = p * t - 0.284496736F;
  p = p * t + 0.254829592F;
  const Floats tail = p * t * exp(-z * z);  // 1 - erf |z|
  return 0.5F * x * select(x < 0.0F, tail, 2.0F - tail);
}

template <typename Body>
QVL_INLINE void in_steps(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

void gelu(float* x, int64_t n) {
  in_steps(n, [&](int64_t i, int some) { store_some(x + i, gelu_of(load_some(x + i, some)), some); });
}

void silu_mul(const float* gate, float* x, int64_t n) {
  in_steps(n, [&](int64_t i, int some) {
    const Floats g = load_some(gate + i, some);
    store_some(x + i, load_some(x + i, some) * (g / (1.0F + exp(-g))), some);
  });
}

void add(const float* from, float* to, int64_t n) {
  in_steps(n, [&](int64_t i, int some) {
    store_some(to + i, load_some(to + i, some) + load_some(from + i, some), some);
  });
}

template <typename Half>
void widen_all(const uint16_t* from, float* to, int64_t n) {
  const Half* halves = reinterpret_cast<const Half*>(from);
  in_steps(n, [&](int64_t i, int some) { store_some(to + i, load_some(halves + i, some), some); });
}

void narrow_all(const float* from, uint16_t* to, int64_t n) {
  in_steps(n, [&](int64_t i, int some) {
    const HalfWords halves = narrow(load_some(from + i, some));
    __builtin_memcpy(to + i, &halves, static_cast<size_t>(some) * 2);
  });
}

void narrow_all_float16(const float* from, uint16_t* to, int64_t n) {
  in_steps(n, [&](int64_t i, int some) {
    const HalfWords halves = narrow_float16(load_some(from + i, some));
    __builtin_memcpy(to + i, &halves, static_cast<size_t>(some) * 2);
  });
}

float narrow_all_int8(const float* from, int8_t* to, int64_t n) {
  Floats magnitudes{};
  in_steps(n, [&](int64_t i, int some) {
    const Floats v = load_some(from + i, some);
    magnitudes = max(magnitudes, max(v, -v));
  });
  const float most = largest(magnitudes);
  // Treat a denormal as zero: its inverse would overflow.
  const bool usable = most > 1e-35F && most < __builtin_inff();
  const float inverse = usable ? 127.0F / most : 0.0F;
  in_steps(n, [&](int64_t i, int some) {
    const FewBytes bytes = narrow_few(nearest(load_some(from + i, some) * inverse));
    __builtin_memcpy(to + i, &bytes, static_cast<size_t>(some));
  });
  return usable ? most / 127.0F : 0.0F;
}

void rotate(float* x, const float* cos, const float* sin, int head_dim, float scale) {
  float* const upper = x + head_dim / 2;
  each_vector(head_dim / 2, [&](int i, int some) {
    const Floats a = load_some(x + i, some), b = load_some(upper + i, some);
    const Floats c = load_some(cos + i, some), s = load_some(sin + i, some);
    store_some(x + i, (a * c - b * s) * scale, some);
    store_some(upper + i, (b * c + a * s) * scale, some);
  });
}

}  // namespace
