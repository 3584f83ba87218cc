// Activation functions, additions, conversions between storage types and float32, and rotary rotation.
//
// Layout: float32 [n], processed in vectors of kLanes values and a remainder of `count` < kLanes. The
// rotation pairs channel i of the lower half of a head with channel i of its upper half:
//
//   x  [ a0 a1 .. a(d/2-1) | b0 b1 .. b(d/2-1) ]      a' = (a * cos - b * sin) * scale
//                                                     b' = (b * cos + a * sin) * scale
//
// Cost: 1 to 2 reads and 1 write of n values in the cache. gelu and silu_mul also compute an exponential per
// value, 20 to 30 operations, which takes longer than the memory accesses. Compared with a matrix product,
// which takes thousands of operations per value, the cost is negligible.
//
// Reference: reference::gelu, silu_mul, rotary; test_activations, test_bfloat16, test_rotary of
// tests/csrc/test_kernels.py. narrow_all_float16 and narrow_all_int8: test_attention with caches of these
// types.
#pragma once

#include "cpu/kernels/norm.h"
#include "cpu/kernels/simd.h"

namespace {

// x * (1 + erf(x / sqrt(2))) / 2, erf after Abramowitz and Stegun 7.1.26: error at most 1.5e-7.
QVL_INLINE Floats gelu_of(Floats x) {
  const Floats z = max(x, -x) * 0.70710678118654752F;
  const Floats t = 1.0F / (1.0F + 0.3275911F * z);
  Floats p = broadcast(1.061405429F);
  p = p * t - 1.453152027F;
  p = p * t + 1.421413741F;
  p = p * t - 0.284496736F;
  p = p * t + 0.254829592F;
  const Floats tail = p * t * exp(-z * z);  // 1 - erf |z|
  return 0.5F * x * select(x < 0.0F, tail, 2.0F - tail);
}

// each_vector (norm.h) for a 64-bit n.
template <typename Body>
QVL_INLINE void each_vector64(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

void gelu(float* x, int64_t n) {
  each_vector64(n,
                [&](int64_t i, int count) { store_first(x + i, gelu_of(load_first(x + i, count)), count); });
}

void silu_mul(const float* gate, float* x, int64_t n) {
  each_vector64(n, [&](int64_t i, int count) {
    const Floats g = load_first(gate + i, count);
    store_first(x + i, load_first(x + i, count) * (g / (1.0F + exp(-g))), count);
  });
}

void add(const float* from, float* to, int64_t n) {
  each_vector64(n, [&](int64_t i, int count) {
    store_first(to + i, load_first(to + i, count) + load_first(from + i, count), count);
  });
}

// Convert n values of a 16-bit type to float32.
template <typename Half>
void widen_all(const uint16_t* from, float* to, int64_t n) {
  const Half* halves = reinterpret_cast<const Half*>(from);
  each_vector64(n, [&](int64_t i, int count) { store_first(to + i, load_first(halves + i, count), count); });
}

// Convert n values to bfloat16.
void narrow_all(const float* from, uint16_t* to, int64_t n) {
  each_vector64(n, [&](int64_t i, int count) {
    const HalfWords halves = narrow(load_first(from + i, count));
    __builtin_memcpy(to + i, &halves, static_cast<size_t>(count) * 2);
  });
}

// Convert n values to float16, clamped to its range.
void narrow_all_float16(const float* from, uint16_t* to, int64_t n) {
  each_vector64(n, [&](int64_t i, int count) {
    const HalfWords halves = narrow_float16(load_first(from + i, count));
    __builtin_memcpy(to + i, &halves, static_cast<size_t>(count) * 2);
  });
}

// Quantize n values to int8 with one scale, which is returned.
float narrow_all_int8(const float* from, int8_t* to, int64_t n) {
  Floats magnitudes{};
  each_vector64(n, [&](int64_t i, int count) {
    const Floats v = load_first(from + i, count);
    magnitudes = max(magnitudes, max(v, -v));
  });
  const float maximum = largest(magnitudes);
  // If the maximum is infinite or at most 1e-35, all values become zero: below 3.7e-37 the inverse would
  // overflow.
  const bool usable = maximum > 1e-35F && maximum < __builtin_inff();
  const float inverse = usable ? 127.0F / maximum : 0.0F;
  each_vector64(n, [&](int64_t i, int count) {
    const LaneBytes bytes = narrow_to_bytes(nearest(load_first(from + i, count) * inverse));
    __builtin_memcpy(to + i, &bytes, static_cast<size_t>(count));
  });
  return usable ? maximum / 127.0F : 0.0F;
}

void rotate(float* x, const float* cos, const float* sin, int head_dim, float scale) {
  float* const upper = x + head_dim / 2;
  each_vector(head_dim / 2, [&](int i, int count) {
    const Floats a = load_first(x + i, count), b = load_first(upper + i, count);
    const Floats c = load_first(cos + i, count), s = load_first(sin + i, count);
    store_first(x + i, (a * c - b * s) * scale, count);
    store_first(upper + i, (b * c + a * s) * scale, count);
  });
}

}  // namespace
