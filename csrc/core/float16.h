// Conversions between float32 and the bits of IEEE half precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qvl {

inline float from_float16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7FFFu) << 13;
  const bool finite = (bits & 0x7C00u) != 0x7C00u;
  const uint32_t wide = finite ? magnitude : magnitude | 0x7F800000u;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  // Multiply by 2^112: 112 is the difference of the exponent biases, 127 - 15. This converts subnormal
  // numbers as well.
  if (finite) value *= 0x1p112F;
  return sign ? -value : value;
}

// Round to nearest, ties to even; overflow becomes infinity, NaN stays NaN.
inline uint16_t to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // from 65520: rounds to infinity
  if (bits < 0x38800000u) {  // below 2^-14: a subnormal number, a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::lrint(std::fabs(value) * 0x1p24F)));
  }
  // A normal number: round off 13 bits of the mantissa and subtract 112 from the exponent.
  bits += 0xFFFu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | (bits - 0x38000000u) >> 13);
}

}  // namespace qvl
