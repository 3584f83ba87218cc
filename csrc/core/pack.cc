#include "core/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "core/bfloat16.h"
#include "core/error.h"
#include "core/float16.h"

namespace qvl {
namespace {

// Value with the largest magnitude, with its sign. Fails if a value is not finite.
float largest_magnitude(const float* values, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    QVL_REQUIRE(std::isfinite(values[i]), QVL_INVALID, "values: one of them is not a finite number");
    if (std::fabs(values[i]) > std::fabs(largest)) largest = values[i];
  }
  return largest;
}

// The integer nearest to value / scale in a range.
int quantize(float value, float scale, int minimum, int maximum) {
  const float quotient = scale != 0 ? value / scale : 0;
  return static_cast<int>(
      std::lrint(std::clamp(quotient, static_cast<float>(minimum), static_cast<float>(maximum))));
}

void pack_int8_row(const float* row, int64_t in, int8_t* values, float* scale) {
  *scale = std::fabs(largest_magnitude(row, in)) / 127;
  std::memset(values, 0, static_cast<size_t>(padded(in)));
  for (int64_t k = 0; k < in; ++k) values[k] = static_cast<int8_t>(quantize(row[k], *scale, -127, 127));
}

// Byte, and shift within the byte, of value k of a row with 4 bits per value (qwenvl.h).
int64_t nibble_byte(int64_t k) {
  const int64_t unit = k / kPackUnit, j = k % kPackUnit / 32, i = k % 32;
  return unit * (kPackUnit / 2) + 2 * i + j / 2;
}
int nibble_shift(int64_t k) {
  return k % 64 >= 32 ? 4 : 0;
}

typedef float Four __attribute__((vector_size(16)));

// Squared error of a group's values when they are stored as int4 with this scale; n is a multiple of 4.
float int4_error(const float* values, int64_t n, float scale) {
  constexpr float kShift = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  // Subtracting Four{} broadcasts a scalar.
  const Four inverse = 1 / scale - Four{}, minimum = -8.0F - Four{}, maximum = 7.0F - Four{};
  Four errors = {};
  for (int64_t i = 0; i < n; i += 4) {
    Four value;
    std::memcpy(&value, values + i, sizeof value);
    Four quotient = value * inverse;
    quotient = quotient < minimum ? minimum : quotient;
    quotient = quotient > maximum ? maximum : quotient;
    const Four error = value - ((quotient + kShift) - kShift) * scale;
    errors += error * error;
  }
  return errors[0] + errors[1] + errors[2] + errors[3];
}

// bfloat16 scale with the least squared error among five candidates. A candidate maps the value with the
// largest magnitude to one of kTargets, so the scale has the opposite sign of that value. With targets below
// -8 the value is clipped to -8, in exchange for a finer scale; with -7.5 it is rounded to an integer.
uint16_t int4_scale(const float* values, int64_t n) {
  constexpr float kTargets[] = {-8.0F, -7.5F, -7.0F, -8.6F, -9.2F};
  const float largest = largest_magnitude(values, n);
  uint16_t best = to_bfloat16(largest / kTargets[0]);
  if (from_bfloat16(best) == 0) return best;
  float least_error = int4_error(values, n, from_bfloat16(best));
  for (size_t i = 1; i < std::size(kTargets); ++i) {
    const uint16_t bits = to_bfloat16(largest / kTargets[i]);
    const float error = from_bfloat16(bits) != 0 ? int4_error(values, n, from_bfloat16(bits)) : least_error;
    if (error < least_error) {
      least_error = error;
      best = bits;
    }
  }
  return best;
}

void pack_int4_row(const float* row, int64_t in, int group, uint8_t* values, uint16_t* scales) {
  const int64_t width = padded(in);
  std::memset(values, 0x88, static_cast<size_t>(width / 2));  // two nibbles of 8, which have the value 0
  for (int64_t first = 0; first < width; first += group) {
    const int64_t n = std::max<int64_t>(0, std::min<int64_t>(group, in - first));
    float padded_group[kPackUnit] = {};
    if (n > 0) std::memcpy(padded_group, row + first, static_cast<size_t>(n) * sizeof(float));
    const uint16_t bits = int4_scale(padded_group, group);
    const float scale = from_bfloat16(bits);
    scales[first / group] = bits;
    for (int64_t k = first; k < first + n; ++k) {
      uint8_t& byte = values[nibble_byte(k)];
      const int shift = nibble_shift(k);
      const int nibble = quantize(row[k], scale, -8, 7) + 8;
      byte = static_cast<uint8_t>((byte & ~(15 << shift)) | (nibble << shift));
    }
  }
}

}  // namespace

uint64_t value_bytes(qvl_dtype dtype, int64_t out, int64_t in) {
  constexpr int64_t kMaxSize = int64_t{1} << 31;
  if (out < 1 || in < 1 || out > kMaxSize || in > kMaxSize) return 0;
  const auto rows = static_cast<uint64_t>(out);
  if (dtype == QVL_INT32 && in != 1) return 0;  // the order of a matrix's columns, a vector
  const int64_t columns = is_quantized(dtype) ? padded(in) : in;
  // So many values have at most 2^63 bits, and their offsets fit int64_t.
  constexpr int64_t kMaxValues = int64_t{1} << 58;
  if (columns > kMaxValues / out) return 0;
  return rows * static_cast<uint64_t>(columns) * static_cast<uint64_t>(value_bits(dtype)) / 8;
}

uint64_t scale_bytes(qvl_dtype dtype, int64_t out, int64_t in) {
  const auto rows = static_cast<uint64_t>(out);
  if (dtype == QVL_INT8) return rows * sizeof(float);
  return group_size(dtype) ? rows * static_cast<uint64_t>(padded(in) / group_size(dtype)) * 2 : 0;
}

uint64_t packed_bytes(qvl_dtype dtype, int64_t out, int64_t in) {
  const uint64_t values = value_bytes(dtype, out, in);
  if (values == 0) return 0;
  return values + scale_bytes(dtype, out, in) * (has_zeros(dtype) ? 2 : 1);
}

void pack(qvl_dtype dtype, int64_t out, int64_t in, const float* values, void* packed) {
  auto* bytes = static_cast<uint8_t*>(packed);
  uint8_t* scales = bytes + value_bytes(dtype, out, in);
  const int64_t width = padded(in);
  const int group = group_size(dtype);
  for (int64_t row = 0; row < out; ++row) {
    const float* source = values + row * in;
    switch (dtype) {
      case QVL_FLOAT32:
        std::memcpy(bytes + row * in * 4, source, static_cast<size_t>(in) * 4);
        break;
      case QVL_BFLOAT16:
        for (int64_t k = 0; k < in; ++k)
          reinterpret_cast<uint16_t*>(bytes)[row * in + k] = to_bfloat16(source[k]);
        break;
      case QVL_FLOAT16:
        for (int64_t k = 0; k < in; ++k)
          reinterpret_cast<uint16_t*>(bytes)[row * in + k] = to_float16(source[k]);
        break;
      case QVL_INT8:
        pack_int8_row(source, in, reinterpret_cast<int8_t*>(bytes) + row * width,
                      reinterpret_cast<float*>(scales) + row);
        break;
      default:  // QVL_INT4_G*; types with zero points are packed by pack_groups()
        pack_int4_row(source, in, group, bytes + row * width / 2,
                      reinterpret_cast<uint16_t*>(scales) + row * (width / group));
    }
  }
}

void pack_groups(qvl_dtype dtype, int64_t out, int64_t in, const uint8_t* integers, const uint16_t* scales,
                 const uint16_t* zeros, void* packed) {
  auto* bytes = static_cast<uint8_t*>(packed);
  auto* to_scales = reinterpret_cast<uint16_t*>(bytes + value_bytes(dtype, out, in));
  uint16_t* to_zeros = to_scales + scale_bytes(dtype, out, in) / sizeof(uint16_t);
  const int64_t width = padded(in), group = group_size(dtype), n_groups = (in + group - 1) / group;
  std::memset(packed, 0, packed_bytes(dtype, out, in));
  for (int64_t row = 0; row < out; ++row) {
    for (int64_t g = 0; g < n_groups; ++g) {
      const uint16_t scale = scales[row * n_groups + g], zero = zeros[row * n_groups + g];
      const float value = from_float16(zero);
      QVL_REQUIRE(std::isfinite(from_float16(scale)), QVL_INVALID, "scales: one of them is not finite");
      QVL_REQUIRE(value >= 0 && value <= 256 && value == std::floor(value), QVL_INVALID,
                  "zeros: one of them is %g; they must be whole numbers from 0 to 256",
                  static_cast<double>(value));
      to_scales[row * (width / group) + g] = scale;
      to_zeros[row * (width / group) + g] = zero;
    }
    const uint8_t* from = integers + row * in;
    if (value_bits(dtype) == 8) {
      std::memcpy(bytes + row * width, from, static_cast<size_t>(in));
      continue;
    }
    uint8_t* to = bytes + row * width / 2;
    for (int64_t k = 0; k < in; ++k) {
      QVL_REQUIRE(from[k] < 16, QVL_INVALID, "integers: one of them is %d; 4 bits hold 0 to 15", from[k]);
      uint8_t& byte = to[nibble_byte(k)];
      byte = static_cast<uint8_t>(byte | from[k] << nibble_shift(k));
    }
  }
}

void unpack(qvl_dtype dtype, int64_t out, int64_t in, const void* packed, float* values) {
  const auto* bytes = static_cast<const uint8_t*>(packed);
  const uint8_t* scales = bytes + value_bytes(dtype, out, in);
  const uint8_t* zeros = scales + scale_bytes(dtype, out, in);
  const int64_t width = padded(in);
  const int group = group_size(dtype);
  for (int64_t row = 0; row < out; ++row) {
    for (int64_t k = 0; k < in; ++k) {
      float& value = values[row * in + k];
      switch (dtype) {
        case QVL_FLOAT32:
          value = reinterpret_cast<const float*>(bytes)[row * in + k];
          break;
        case QVL_BFLOAT16:
          value = from_bfloat16(reinterpret_cast<const uint16_t*>(bytes)[row * in + k]);
          break;
        case QVL_FLOAT16:
          value = from_float16(reinterpret_cast<const uint16_t*>(bytes)[row * in + k]);
          break;
        case QVL_INT8:
          value = reinterpret_cast<const float*>(scales)[row] *
                  reinterpret_cast<const int8_t*>(bytes)[row * width + k];
          break;
        default: {
          const int integer = value_bits(dtype) == 8
                                  ? bytes[row * width + k]
                                  : bytes[row * width / 2 + nibble_byte(k)] >> nibble_shift(k) & 15;
          const int64_t index = row * (width / group) + k / group;
          const uint16_t scale = reinterpret_cast<const uint16_t*>(scales)[index];
          if (has_zeros(dtype)) {
            const float zero = from_float16(reinterpret_cast<const uint16_t*>(zeros)[index]);
            value = from_float16(scale) * (static_cast<float>(integer) - zero);
          } else {
            value = from_bfloat16(scale) * static_cast<float>(integer - 8);
          }
        }
      }
    }
  }
}

}  // namespace qvl
