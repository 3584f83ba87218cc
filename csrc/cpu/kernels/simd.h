// Compiler vector types of the ISA's width, and the few instructions without an operator.
//
//               generic (SSE2)   avx2    avx512, avx512_bf16
//   kLanes            4            8        16                 float32 in a vector
//
//   Floats, Ints, Words     kLanes x 32 bits          Halves, Shorts           2 kLanes x 16 bits
//   HalfWords               kLanes x 16 bits          UnsignedBytes, SignedBytes  4 kLanes x 8 bits
//   LaneBytes               kLanes x 8 bits
//
// load_first and store_first access only the first n lanes, for the end of a row. Everything is in an
// anonymous namespace, and no inline functions of the standard library are used: the linker keeps one copy of
// an inline function for the whole program, and that copy might be compiled for a newer processor.
//
// Reference: float16 and bfloat16 conversions, tests/csrc/test_kernels.py::test_every_float16, test_bfloat16;
// the other functions through the kernels.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef int16_t Shorts __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfWords __attribute__((vector_size(kLanes * 2)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(kLanes * 4)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes * 4)));
typedef int8_t LaneBytes __attribute__((vector_size(kLanes)));

#define QVL_INLINE inline __attribute__((always_inline))

// Round n up to a multiple of `unit`.
QVL_INLINE int round_up(int n, int unit) {
  return (n + unit - 1) / unit * unit;
}

template <typename Vector>
QVL_INLINE Vector load(const void* memory) {
  Vector v;
  __builtin_memcpy(&v, memory, sizeof v);
  return v;
}

template <typename Vector>
QVL_INLINE void store(void* memory, Vector v) {
  __builtin_memcpy(memory, &v, sizeof v);
}

// Vector with the value in all lanes.
QVL_INLINE Floats broadcast(float value) {
  return value - Floats{};
}

// Load the first n lanes; the others are zero.
QVL_INLINE Floats load_first(const float* memory, int n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), memory));
#else
  if (n == kLanes) return load<Floats>(memory);
  Floats v{};
  __builtin_memcpy(&v, memory, static_cast<size_t>(n) * sizeof(float));
  return v;
#endif
}

// As load_first, for 16-bit values.
QVL_INLINE HalfWords load_first_halves(const uint16_t* memory, int n) {
#if defined(__AVX512BW__)
  return reinterpret_cast<HalfWords>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), memory));
#else
  HalfWords v{};
  __builtin_memcpy(&v, memory, static_cast<size_t>(n) * sizeof(uint16_t));
  return v;
#endif
}

// Store the first n lanes.
QVL_INLINE void store_first(float* memory, Floats v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(memory, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
#else
  if (n == kLanes) return store(memory, v);
  __builtin_memcpy(memory, &v, static_cast<size_t>(n) * sizeof(float));
#endif
}

// Lanes of `yes` where the mask is -1, of `no` where it is 0.
QVL_INLINE Floats select(Ints mask, Floats yes, Floats no) {
  return mask ? yes : no;
}
QVL_INLINE Floats max(Floats a, Floats b) {
  return a > b ? a : b;
}
QVL_INLINE Floats min(Floats a, Floats b) {
  return a < b ? a : b;
}

// Lane i of the result is lane from[i] of a, or of b where from[i] >= kLanes.
QVL_INLINE Words shuffle(Words a, Words b, Words from) {
#if defined(__clang__)
  Words v;
  for (int i = 0; i < kLanes; ++i) v[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
  return v;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// One step of a transposition: take rows a and b, `Side` rows apart, of a matrix cut into squares of Side x
// Side lanes, and exchange the off-diagonal squares. upper_squares returns the new a, lower_squares the new
// b. The lane numbers are a parameter pack because shuffles need constants.
using AllLanes = std::make_integer_sequence<uint32_t, kLanes>;

template <uint32_t Side, uint32_t... I>
QVL_INLINE Words upper_squares(Words a, Words b, std::integer_sequence<uint32_t, I...>) {
  return shuffle(a, b, Words{(I & Side ? kLanes + I - Side : I)...});
}
template <uint32_t Side, uint32_t... I>
QVL_INLINE Words lower_squares(Words a, Words b, std::integer_sequence<uint32_t, I...>) {
  return shuffle(a, b, Words{(I & Side ? kLanes + I : I + Side)...});
}

// Transpose kLanes vectors as a square matrix.
template <uint32_t Side = 1>
QVL_INLINE void transpose(Words (&v)[kLanes]) {
#pragma GCC unroll 16
  for (uint32_t i = 0; i < kLanes; ++i) {
    if (i & Side) continue;
    const Words a = v[i], b = v[i + Side];
    v[i] = upper_squares<Side>(a, b, AllLanes{});
    v[i + Side] = lower_squares<Side>(a, b, AllLanes{});
  }
  if constexpr (2 * Side < kLanes) transpose<2 * Side>(v);
}

// Sum of all lanes: add the upper half to the lower half until one lane remains. The order of the additions
// depends only on kLanes.
QVL_INLINE float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#endif
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

// The sums of kLanes vectors: lane i of the result equals sum(v[i]), bit for bit. Fewer operations than
// kLanes calls of sum(), because each step merges two vectors into one. Overwrites v.
template <uint32_t Side = kLanes / 2>
QVL_INLINE Floats sums_of(Floats (&v)[kLanes]) {
#pragma GCC unroll 8
  for (uint32_t i = 0; i < Side; ++i) {
    const Words a = reinterpret_cast<Words>(v[i]), b = reinterpret_cast<Words>(v[i + Side]);
    v[i] = reinterpret_cast<Floats>(upper_squares<Side>(a, b, AllLanes{})) +
           reinterpret_cast<Floats>(lower_squares<Side>(a, b, AllLanes{}));
  }
  if constexpr (Side > 1) return sums_of<Side / 2>(v);
  return v[0];
}

// Largest lane.
QVL_INLINE float largest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#endif
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
  float maximum = lanes[0];
  for (int i = 1; i < kLanes; ++i) maximum = lanes[i] > maximum ? lanes[i] : maximum;
  return maximum;
}

QVL_INLINE Floats to_floats(Ints v) {
  return __builtin_convertvector(v, Floats);
}

// A word holds a pair of bfloat16 values: the one with even index in its lower half, the one with odd index
// in its upper half. even() and odd() convert them to float32.
QVL_INLINE Floats even(Words pairs) {
  return reinterpret_cast<Floats>(pairs << 16);
}
QVL_INLINE Floats odd(Words pairs) {
  return reinterpret_cast<Floats>(pairs & 0xFFFF0000u);
}

// Most conversions between lane widths use intrinsics, since the compiler's own conversions split the
// vectors. widen_halves extends 16 bits with zeros.
QVL_INLINE Words widen_halves(HalfWords halves) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}

// The lower 16 bits of each lane.
QVL_INLINE HalfWords lower_halves(Words words) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfWords>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
#else
  return __builtin_convertvector(words, HalfWords);
#endif
}

// Sign-extend bytes.
QVL_INLINE Ints widen_bytes(LaneBytes bytes) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes))));
#else
  return __builtin_convertvector(bytes, Ints);
#endif
}

// Convert bfloat16 to float32.
QVL_INLINE Floats widen(HalfWords halves) {
  return reinterpret_cast<Floats>(widen_halves(halves) << 16);
}

// Convert float16 to float32.
QVL_INLINE Floats widen_float16(HalfWords halves) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(halves)));
#elif defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(halves)));
#else
  // Multiply by 2^112: 112 is the difference of the exponent biases, 127 - 15. This converts subnormal
  // numbers as well. Infinity and NaN get the largest exponent instead.
  const Words wide = widen_halves(halves), magnitude = (wide & 0x7FFFu) << 13;
  const Floats finite = reinterpret_cast<Floats>(magnitude) * 0x1p112F;
  const Words bits = (wide & 0x7C00u) == 0x7C00u ? magnitude | 0x7F800000u : reinterpret_cast<Words>(finite);
  return reinterpret_cast<Floats>(bits | (wide & 0x8000u) << 16);
#endif
}

// Storage types, and loads that convert to float32: load_floats loads kLanes values, load_first the first n.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
QVL_INLINE Floats load_floats(const float* memory) {
  return load<Floats>(memory);
}
QVL_INLINE Floats load_floats(const Float16* memory) {
  return widen_float16(load<HalfWords>(memory));
}
QVL_INLINE Floats load_floats(const BFloat16* memory) {
  return widen(load<HalfWords>(memory));
}
QVL_INLINE Floats load_floats(const int8_t* memory) {
  return to_floats(widen_bytes(load<LaneBytes>(memory)));
}
QVL_INLINE Floats load_first(const int8_t* memory, int n) {
  LaneBytes bytes{};
  __builtin_memcpy(&bytes, memory, static_cast<size_t>(n));
  return to_floats(widen_bytes(bytes));
}
QVL_INLINE Floats load_first(const Float16* memory, int n) {
  return widen_float16(load_first_halves(&memory->bits, n));
}
QVL_INLINE Floats load_first(const BFloat16* memory, int n) {
  return widen(load_first_halves(&memory->bits, n));
}

// Convert float32 to bfloat16, rounding to nearest, ties to even. v must not contain NaN.
QVL_INLINE HalfWords narrow(Floats v) {
  Words bits = reinterpret_cast<Words>(v);
  bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return lower_halves(bits);
}

// Convert float32 to float16, rounding to nearest, ties to even. Values out of range become the nearest
// finite value, NaN the largest one.
QVL_INLINE HalfWords narrow_float16(Floats v) {
  v = max(min(v, broadcast(65504.0F)), broadcast(-65504.0F));
#if defined(__AVX512F__)
  return reinterpret_cast<HalfWords>(
      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<HalfWords>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Words bits = reinterpret_cast<Words>(v), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // 112 is the difference of the exponent biases, 127 - 15.
  const Words normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal float16 numbers are multiples of 2^-24, the distance between float32 numbers above 0.5: adding
  // 0.5 rounds to such a multiple, and the lowest bits of the sum contain the multiplier.
  const Floats half = broadcast(0.5F);
  const Words subnormal =
      reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + half) - reinterpret_cast<Words>(half);
  // 113 << 23 is 2^-14, the smallest normal float16 number.
  const Words rounded = magnitude >= (113u << 23) ? normal : subnormal;
  return lower_halves(rounded | sign >> 16);
#endif
}

// Round to the nearest integer; for magnitudes up to 2^22.
QVL_INLINE Ints nearest(Floats v) {
  const Floats shift = broadcast(12582912.0F);  // 1.5 * 2^23: float32 numbers of this size are integers
  return __builtin_convertvector((v + shift) - shift, Ints);
}

// Convert integers, which must be from -128 to 127, to bytes.
QVL_INLINE LaneBytes narrow_to_bytes(Ints v) {
#if defined(__AVX512F__)
  return reinterpret_cast<LaneBytes>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i wide = reinterpret_cast<__m256i>(v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const __m128i bytes = _mm_packs_epi16(halves, halves);
  return load<LaneBytes>(&bytes);
#else
  return __builtin_convertvector(v, LaneBytes);
#endif
}

// Add to sums[i] the four products a[4i + j] * b[4i + j], j = 0 to 3. In the ISA avx2, which has no VNNI, a
// must be at most 128, because two products are added in 16 bits; for signed a, multiply_add_signed has no
// such limit.
QVL_INLINE Ints multiply_add(Ints sums, UnsignedBytes a, SignedBytes b) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return sums + reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  // Multiply even and odd bytes separately: 16 bits are enough for a product, but not for the sum of two.
  const Shorts a_even = reinterpret_cast<Shorts>(reinterpret_cast<Halves>(a) & 0xFF);
  const Shorts a_odd = reinterpret_cast<Shorts>(reinterpret_cast<Halves>(a) >> 8);
  const Shorts b_even = reinterpret_cast<Shorts>(b) << 8 >> 8, b_odd = reinterpret_cast<Shorts>(b) >> 8;
  const Ints even = reinterpret_cast<Ints>(a_even * b_even), odd = reinterpret_cast<Ints>(a_odd * b_odd);
  return sums + (even << 16 >> 16) + (even >> 16) + (odd << 16 >> 16) + (odd >> 16);
#endif
}

// kSignedProducts: products of signed weights use multiply_add_signed, because weights that an offset of 128
// makes unsigned exceed the limit of multiply_add.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr bool kSignedProducts = true;

// multiply_add for signed bytes a: the signs of a are moved to b, which must not contain -128.
QVL_INLINE Ints multiply_add_signed(Ints sums, SignedBytes a, SignedBytes b) {
  const __m256i from = reinterpret_cast<__m256i>(a);
  return multiply_add(sums, reinterpret_cast<UnsignedBytes>(_mm256_abs_epi8(from)),
                      reinterpret_cast<SignedBytes>(_mm256_sign_epi8(reinterpret_cast<__m256i>(b), from)));
}
#else
constexpr bool kSignedProducts = false;

// Declared for code that is discarded at compile time; never defined.
QVL_INLINE Ints multiply_add_signed(Ints sums, SignedBytes a, SignedBytes b);
#endif

// Keep an address in a register, which the compiler would otherwise recompute at each use.
template <typename T>
QVL_INLINE void keep(const T*& address) {
  asm volatile("" : "+r"(address));
}

// Prefetch a cache line; the address may be invalid.
QVL_INLINE void prefetch(const void* memory) {
  __builtin_prefetch(memory, /*write=*/0, /*locality=*/2);
}

// e^x with a relative error of about 1e-7 for x in [-87, 88]; 0 for smaller x, infinity for larger x,
// e^-87 for NaN.
QVL_INLINE Floats exp(Floats x) {
  const Floats unclamped = x;
  x = min(max(x, broadcast(-87.0F)), broadcast(88.0F));
  // e^x = 2^n * e^r, where n is the nearest integer to x / ln 2 (rounded as in nearest()), and
  // r = x - n * ln 2.
  const Floats shift = broadcast(12582912.0F);
  const Floats shifted = x * 1.44269504088896341F + shift;
  const Floats n = shifted - shift;
  // ln 2 in two parts: the product of n and the first part is exact.
  Floats r = x - n * 0.693359375F;
  r = r - n * -2.12194440e-4F;
  // e^r as a Taylor polynomial of degree 7.
  Floats p = broadcast(1.0F / 5040);
  p = p * r + 1.0F / 720;
  p = p * r + 1.0F / 120;
  p = p * r + 1.0F / 24;
  p = p * r + 1.0F / 6;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Floats value = p * reinterpret_cast<Floats>(power);
  return select(unclamped < -87.0F, Floats{}, select(unclamped > 88.0F, broadcast(__builtin_inff()), value));
}

}  // namespace
