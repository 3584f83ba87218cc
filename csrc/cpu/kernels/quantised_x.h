// Activations as 16-bit integers with a float32 scale for each block of them: products with 8- and 4-bit
// weights are then exact integer sums within a block. The rounding is at most 2^-16 of the block's largest
// value.
#pragma once

#include "cpu/kernels/matvec.h"

namespace {

constexpr int kUnit = 128;    // rows of quantised weights are padded to this
constexpr int kBlock = 1024;  // activations that share a scale; a row's last block may be shorter

// A row's maximum magnitude over a block, lanes behind k being zero.
QVL_INLINE float largest_magnitude(const float* x, int n) {
  Floats most{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats v = load<Floats>(x + i);
    most = max(most, max(v, -v));
  }
  if (i < n) {
    const Floats v = load_some(x + i, n - i);
    most = max(most, max(v, -v));
  }
  return largest(most);
}

// Quantise x [n] to values [block], zero behind n; returns the scale.
QVL_INLINE float quantise_block(const float* x, int n, int block, int16_t* values) {
  const float most = n > 0 ? largest_magnitude(x, n) : 0.0F;
  const float inverse = most > 0 ? 32767.0F / most : 0.0F;
  // Of a denormal maximum the inverse overflows; such a block counts as zero.
  const bool usable = inverse > 0 && inverse < 3.0e38F;
  const Floats magic = all(12582912.0F);
  for (int i = 0; i < block; i += kLanes) {
    const int some = !usable || n <= i ? 0 : n - i < kLanes ? n - i : kLanes;
    const Floats rounded = (load_some(x + (some ? i : 0), some) * inverse + magic) - magic;
    const Ints whole = __builtin_convertvector(some ? rounded : Floats{}, Ints);
    store(values + i, lower_halves(reinterpret_cast<Words>(whole)));
  }
  return usable ? most / 32767.0F : 0.0F;
}

}  // namespace
