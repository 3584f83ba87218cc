// Matrix-vector product with 4- or 8-bit weights and a float16 scale and zero point per group of 32, 64 or
// 128 values of a row: y[n][row] = sum over groups of scale * sum over k of (w[row][k] - zero) * x[n][k],
// x quantized to 8 bits (quantized_x.h).
//
// The term of the zero points is subtracted in float32, once per row of W. prepare_groups computes the sums
// of x in this term, once for all rows:
//
//   sum of scale * (w - zero) * x = sum of scale * (w * x)  -  sum over groups of (scale * zero) * sum of x
//                                   products of integers       one product per group, kLanes in a vector
//
// Layout with 4 bits. Values as in matvec_int4.h: 16-bit word i of a unit (128 values of a row) has v[i],
// v[32 + i], v[64 + i] and v[96 + i]. First, a byte shuffle moves the even bytes of 8 words to even 32-bit
// lanes and the odd bytes to odd lanes. Then a mask extracts the low nibbles, a shift the high ones. In each
// of the two results all values of a lane thus belong to the same group, even with group size 32:
//
//                                                                     group (even lanes, odd lanes) of size
//                 even lanes            odd lanes                     32          64
//   low nibbles   v[i .. i + 3]         v[64 + i .. 64 + i + 3]       0, 2        0, 1
//   high nibbles  v[32 + i .. 35 + i]   v[96 + i .. 96 + i + 3]       1, 3        0, 1
//
// The products of a unit are summed in one vector (with groups of 32 in two, for low and high nibbles), which
// is multiplied by a vector of scales that alternates between two groups (with groups of 128: by one scale).
//
// Layout with 8 bits: uint8 [rows][k padded to 128]. A vector of 64 bytes (AVX-512) contains two groups of
// 32, one in each half of its lanes. The ISA avx2, which has no VNNI, multiplies signed bytes
// (kSignedProducts): 128 is subtracted from the weights and from the zero points.
//
//   scales, zeros:  float16 [rows][padded k / group] each, k padded to 128
//   prepared x:  [n_x] rows, each with its blocks (float32 scales [kLanes], int8 values [kBlock]) and then
//                the float32 sums of x over the groups [groups padded with zeros to kLanes]
//
// Cost. Operations: as in matvec_int4.h and matvec_int8.h. Bytes: with 4 bits rows * k * (1/2 + 4 / group),
// with 8 bits rows * k * (1 + 4 / group); the 4 bytes are a group's scale and zero point.
//
// Reference: reference::linear with the same rounding of activations (rounded_activations),
// tests/csrc/test_kernels.py::test_linear.
#pragma once

#include "cpu/kernels/quantized_x.h"

namespace {

// Layout of prepared x.
template <int Bits, int Group>
struct GroupsX {
  static constexpr int64_t kBlockBytes = sizeof(Floats) + kBlock;
  static constexpr int kGroups = kBlock / Group;  // groups in a block

  // Offset of the sums in a row of prepared x.
  static QVL_INLINE int64_t sums_at(int k) { return round_up(k, kBlock) / kBlock * kBlockBytes; }
  static QVL_INLINE int64_t row_bytes(int k) {
    return sums_at(k) + round_up(round_up(k, kBlock) / Group, kLanes) * int64_t{sizeof(float)};
  }
  static QVL_INLINE const char* row(const Matvec& p, int x) {
    return static_cast<const char*>(p.x) + x * row_bytes(p.k);
  }
};

// Index, within a unit, of the value in byte i of the unit's 128 bytes of prepared x. The bytes are in the
// order of the unpacked weights: the low nibbles of a vector, then its high nibbles.
constexpr int unit_value(int i) {
  const int vector = i / kVector, byte = i % kVector, lane = byte / 4;
  const int word = vector / 2 * (kVector / 2) + byte / 16 * 8 + lane % 4 / 2 * 4 + byte % 4;
  return word + lane % 2 * 64 + vector % 2 * 32;
}

// Group of byte i of a block, relative to the first group of the block.
template <int Bits, int Group>
constexpr int group_of(int i) {
  return (Bits == 8 ? i : i / kUnit * kUnit + unit_value(i % kUnit)) / Group;
}

// Within each 8 words, move even bytes to even 32-bit lanes and odd bytes to odd lanes.
QVL_INLINE UnsignedBytes gather_bytes(UnsignedBytes words) {
#if defined(__AVX512BW__)
  const __m128i from = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return reinterpret_cast<UnsignedBytes>(
      _mm512_shuffle_epi8(reinterpret_cast<__m512i>(words), _mm512_broadcast_i32x4(from)));
#elif defined(__AVX2__)
  const __m128i from = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return reinterpret_cast<UnsignedBytes>(
      _mm256_shuffle_epi8(reinterpret_cast<__m256i>(words), _mm256_broadcastsi128_si256(from)));
#else
  UnsignedBytes v;
  for (int i = 0; i < kVector; ++i) v[i] = words[i / 16 * 16 + i % 16 / 8 * 8 + i % 4 * 2 + i % 8 / 4];
  return v;
#endif
}

// Add to sums [kGroups] the sum of x over each group of a block.
template <int Bits, int Group>
QVL_INLINE void sum_groups(const char* block, float* sums) {
  // Of the 8 vectors of a block, first add, as integers, those whose lanes belong to the same groups; the
  // groups change every kStep vectors.
  constexpr int kStep = Bits == 8 ? (Group > kVector ? Group : kVector) / kVector : kUnit / kVector;
  // Low and high nibbles belong to different groups of 32, and their vectors alternate.
  constexpr int kClasses = Bits == 4 && Group == 32 ? 2 : 1;
  const UnsignedBytes ones = UnsignedBytes{} + uint8_t{1};
  const Floats scales = load<Floats>(block);
#pragma GCC unroll 8
  for (int first = 0; first < 8; first += kStep) {
#pragma GCC unroll 2
    for (int c = 0; c < kClasses; ++c) {
      Ints ints{};
#pragma GCC unroll 8
      for (int v = first + c; v < first + kStep; v += kClasses) {
        ints = multiply_add(ints, ones, load<SignedBytes>(block + sizeof(Floats) + v * kVector));
      }
      const Floats values = to_floats(ints) * scales;
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[group_of<Bits, Group>((first + c) * kVector + 4 * lane)] += values[lane];
      }
    }
  }
}

template <int Bits, int Group>
size_t prepared_bytes_groups(int k, int n_x) {
  return static_cast<size_t>(GroupsX<Bits, Group>::row_bytes(k) * n_x);
}

template <int Bits, int Group>
void prepare_groups(const float* x, int64_t x_stride, int n_x, int k, void* prepared) {
  using X = GroupsX<Bits, Group>;
  char* row = static_cast<char*>(prepared);
  for (int n = 0; n < n_x; ++n, x += x_stride, row += X::row_bytes(k)) {
    char* block = row;
    auto* sums = reinterpret_cast<float*>(row + X::sums_at(k));
    __builtin_memset(sums, 0, static_cast<size_t>(X::row_bytes(k) - X::sums_at(k)));
    for (int first = 0; first < k; first += kBlock, block += X::kBlockBytes, sums += X::kGroups) {
      float values[kBlock], ordered[kBlock];
      const float* from = x + first;
      if (k - first < kBlock) {
        for (int i = 0; i < kBlock; ++i) values[i] = first + i < k ? from[i] : 0.0F;
        from = values;
      }
      for (int i = 0; i < kBlock; i += 4) {
        const int index = Bits == 8 ? i : i / kUnit * kUnit + unit_value(i % kUnit);
        __builtin_memcpy(ordered + i, from + index, 4 * sizeof(float));
      }
      quantize_values(ordered, block, block + sizeof(Floats));
      sum_groups<Bits, Group>(block, sums);
    }
  }
}

// Load n scales, or zero points, from `index` on; the other lanes are zero.
QVL_INLINE Floats load_scales(const void* scales, int64_t index, int n) {
  const auto* from = static_cast<const uint16_t*>(scales) + index;
  return widen_float16(n == kLanes ? load<HalfWords>(from) : load_first_halves(from, n));
}

// Vectors of two scales. alternating(): scales[0] in even lanes, scales[1] in odd lanes. by_halves():
// scales[0] in the lower half of the lanes, scales[1] in the upper half.
QVL_INLINE Floats alternating(const float* scales) {
  typedef uint64_t Pairs __attribute__((vector_size(sizeof(Floats))));
  uint64_t pair;
  __builtin_memcpy(&pair, scales, sizeof pair);
  return reinterpret_cast<Floats>(pair + Pairs{});
}
QVL_INLINE Floats by_halves(const float* scales) {
  Ints upper;
  for (int i = 0; i < kLanes; ++i) upper[i] = i >= kLanes / 2 ? -1 : 0;
  return select(upper, broadcast(scales[1]), broadcast(scales[0]));
}

// `Rows` for a type with zero points; matvec.h documents the members.
template <int Bits, int Group>
struct RowsGroups {
  using X = GroupsX<Bits, Group>;
  static constexpr int kColumnBlock = 2048;
  static constexpr int kXAtOnce = kLanes == 16 ? 4 : 2;
  static constexpr int rows_at_once(int n) { return n == 1 ? 3 : kLanes == 16 ? 4 : 2; }
  static QVL_INLINE int64_t row_bytes(int k) { return int64_t{round_up(k, kUnit)} * Bits / 8; }
  static constexpr bool kHasScale = false;

  template <int RowCount, int XCount, int Pass, int Passes, int SumStride>
  static QVL_INLINE void add(const Matvec& p, int64_t row, int first_x, int first, int end,
                             WeightPrefetcher& prefetcher, Floats* sums) {
    if (first == 0) initialise<RowCount, XCount, SumStride>(p, row, first_x, sums);
    for (; end - first >= kBlock; first += kBlock) {
      add_units<RowCount, XCount, Pass, Passes, SumStride, kBlock / kUnit>(p, row, first_x, first, prefetcher,
                                                                           sums);
    }
    for (; first < end; first += kUnit)
      add_units<RowCount, XCount, Pass, Passes, SumStride, 1>(p, row, first_x, first, prefetcher, sums);
  }

  // Initialise the sums with the negated term of the zero points, for entire rows: each lane sums the
  // products of some groups.
  template <int RowCount, int XCount, int SumStride>
  static QVL_INLINE void initialise(const Matvec& p, int64_t row, int first_x, Floats* sums) {
    const int groups = round_up(p.k, kUnit) / Group;
    const auto* x = reinterpret_cast<const float*>(X::row(p, first_x) + X::sums_at(p.k));
    const int64_t x_stride = X::row_bytes(p.k) / int64_t{sizeof(float)};
#pragma GCC unroll 8
    for (int r = 0; r < RowCount; ++r) {
      Floats zero_terms[XCount] = {};
#pragma GCC unroll 1
      for (int g = 0; g < groups; g += kLanes) {
        const int n = groups - g < kLanes ? groups - g : kLanes;
        const int64_t index = (row + r) * groups + g;
        Floats zeros = load_scales(p.zeros, index, n);
        if (Bits == 8 && kSignedProducts) zeros -= 128;
        const Floats products = load_scales(p.scales, index, n) * zeros;
#pragma GCC unroll 8
        for (int i = 0; i < XCount; ++i) zero_terms[i] += products * load<Floats>(x + i * x_stride + g);
      }
#pragma GCC unroll 8
      for (int i = 0; i < XCount; ++i) sums[r * SumStride + i] = -zero_terms[i];
    }
  }

  // Add `Units` units from column `first` on, all within one block of x.
  template <int RowCount, int XCount, int Pass, int Passes, int SumStride, int Units>
  static QVL_INLINE void add_units(const Matvec& p, int64_t row, int first_x, int first,
                                   WeightPrefetcher& prefetcher, Floats* sums) {
    const int64_t stride = row_bytes(p.k), scale_stride = round_up(p.k, kUnit) / Group;
    const uint8_t* w = static_cast<const uint8_t*>(p.weights) + row * stride + first * Bits / 8;
    const char* block = X::row(p, first_x) + first / kBlock * X::kBlockBytes;
    const char* x = block + sizeof(Floats) + first % kBlock;

    float factors[RowCount][kLanes];
#pragma GCC unroll 8
    for (int r = 0; r < RowCount; ++r) {
      Floats scales = load_scales(p.scales, (row + r) * scale_stride + first / Group, Units * kUnit / Group);
      if (Bits == 4 && Group == 32) scales = low_and_high(scales);
      store(factors[r], scales);
    }
    // Keep the factors in memory: broadcasting a memory operand of a multiplication costs nothing,
    // broadcasting a register takes two shuffles.
    asm volatile("" : "+m"(factors));
    Floats totals[RowCount][XCount] = {};
    if constexpr (Bits == 4) {
#pragma GCC unroll 4
      for (int u = 0; u < Units; ++u) {
        add_nibbles<RowCount, XCount, Pass, Passes>(w + u * (kUnit / 2), stride, x + u * kUnit,
                                                    X::row_bytes(p.k), factors, u * kUnit / Group, prefetcher,
                                                    totals);
      }
    } else {
      constexpr int kColumns = Group > kVector ? Group : kVector;
#pragma GCC unroll 8
      for (int i = 0; i < Units * kUnit; i += kColumns) {
        add_bytes<RowCount, XCount, Pass, Passes>(w + i, stride, x + i, X::row_bytes(p.k), factors, i / Group,
                                                  i % 64 == 0, prefetcher, totals);
      }
    }
    const char* blocks[XCount];
#pragma GCC unroll 8
    for (int n = 0; n < XCount; ++n) blocks[n] = block + n * X::row_bytes(p.k);
    add_scaled<RowCount, XCount, SumStride>(totals, blocks, /*assign=*/false, sums);
  }

  // Permute scales of groups of 32 to the order of the sums: groups 0 and 2 of a unit (low nibbles), then 1
  // and 3 (high).
  static QVL_INLINE Floats low_and_high(Floats scales) {
    Words from;
    for (uint32_t i = 0; i < kLanes; ++i) from[i] = i / 4 * 4 + i % 4 / 2 + i % 2 * 2;
    const Words words = reinterpret_cast<Words>(scales);
    return reinterpret_cast<Floats>(shuffle(words, words, from));
  }

  // Add a unit of 4-bit weights. factors[..][group] is the scale of its first group.
  template <int RowCount, int XCount, int Pass, int Passes>
  static QVL_INLINE void add_nibbles(const uint8_t* w, int64_t stride, const char* x, int64_t x_stride,
                                     const float (&factors)[RowCount][kLanes], int group,
                                     WeightPrefetcher& prefetcher, Floats (&totals)[RowCount][XCount]) {
    Ints low[RowCount][XCount] = {}, high[RowCount][XCount] = {};
#pragma GCC unroll 4
    for (int part = 0; part < kUnit / 2; part += kVector) {
      UnsignedBytes v[RowCount][2];
#pragma GCC unroll 8
      for (int r = 0; r < RowCount; ++r) {
        const UnsignedBytes bytes = gather_bytes(load<UnsignedBytes>(w + r * stride + part));
        v[r][0] = bytes & uint8_t{15};
        v[r][1] = reinterpret_cast<UnsignedBytes>(reinterpret_cast<Halves>(bytes) >> 4) & uint8_t{15};
        if (r % Passes == Pass && part == 0) prefetcher.next();
      }
#pragma GCC unroll 8
      for (int n = 0; n < XCount; ++n) {
        const SignedBytes a = load<SignedBytes>(x + n * x_stride + 2 * part);
        const SignedBytes b = load<SignedBytes>(x + n * x_stride + 2 * part + kVector);
#pragma GCC unroll 8
        for (int r = 0; r < RowCount; ++r) {
          low[r][n] = multiply_add(low[r][n], v[r][0], a);
          Ints& high_sum = Group == 32 ? high[r][n] : low[r][n];
          high_sum = multiply_add(high_sum, v[r][1], b);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < RowCount; ++r) {
      const float* scales = factors[r] + group;
      const Floats low_scales = Group == 128 ? broadcast(*scales) : alternating(scales);
#pragma GCC unroll 8
      for (int n = 0; n < XCount; ++n) {
        totals[r][n] += to_floats(low[r][n]) * low_scales;
        if constexpr (Group == 32) totals[r][n] += to_floats(high[r][n]) * alternating(scales + 2);
      }
    }
  }

  // Add a group of 8-bit weights, or with AVX-512 the two groups of 32 in a vector. factors[..][group] is the
  // scale of the first group. new_line: w is a multiple of 64 bytes from the start of its row, so prefetch a
  // line.
  template <int RowCount, int XCount, int Pass, int Passes>
  static QVL_INLINE void add_bytes(const uint8_t* w, int64_t stride, const char* x, int64_t x_stride,
                                   const float (&factors)[RowCount][kLanes], int group, bool new_line,
                                   WeightPrefetcher& prefetcher, Floats (&totals)[RowCount][XCount]) {
    Ints dots[RowCount][XCount] = {};
#pragma GCC unroll 8
    for (int i = 0; i < Group; i += kVector) {
      UnsignedBytes v[RowCount];
#pragma GCC unroll 8
      for (int r = 0; r < RowCount; ++r) {
        v[r] = load<UnsignedBytes>(w + r * stride + i);
        if (kSignedProducts) v[r] ^= uint8_t{128};
        if (r % Passes == Pass && new_line && i % 64 == 0) prefetcher.next();
      }
#pragma GCC unroll 8
      for (int n = 0; n < XCount; ++n) {
        const SignedBytes a = load<SignedBytes>(x + n * x_stride + i);
#pragma GCC unroll 8
        for (int r = 0; r < RowCount; ++r) {
          if constexpr (kSignedProducts) {
            dots[r][n] = multiply_add_signed(dots[r][n], reinterpret_cast<SignedBytes>(v[r]), a);
          } else {
            dots[r][n] = multiply_add(dots[r][n], v[r], a);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < RowCount; ++r) {
      const Floats factor = Group < kVector ? by_halves(factors[r] + group) : broadcast(factors[r][group]);
#pragma GCC unroll 8
      for (int n = 0; n < XCount; ++n) totals[r][n] += to_floats(dots[r][n]) * factor;
    }
  }
};

// Multiply kXAtOnce, 2 or 1 rows of x at a time, which limits the number of compiled variants. If the rows of
// x take several passes, each panel of W is read several times, from the cache after the first time.
template <int Bits, int Group>
void matvec_groups(const Matvec& p, int64_t row, int64_t end) {
  using Rows = RowsGroups<Bits, Group>;
  const bool one_pass = p.n_x <= 2 || p.n_x == Rows::kXAtOnce;
  const int64_t step = one_pass ? end - row : kPanelRows;
  Matvec part = p;
  for (; row < end; row += step) {
    const int64_t part_end = end - row < step ? end : row + step;
    for (int first = 0; first < p.n_x; first += part.n_x) {
      const int remaining = p.n_x - first;
      part.n_x = remaining >= Rows::kXAtOnce ? Rows::kXAtOnce : remaining >= 2 ? 2 : 1;
      part.x = Rows::X::row(p, first);
      part.y = p.y + first * p.y_stride;
      if (part.n_x == Rows::kXAtOnce) {
        matvec_many<Rows, Rows::kXAtOnce>(part, row, part_end);
      } else if (part.n_x == 2) {
        matvec_many<Rows, 2>(part, row, part_end);
      } else {
        matvec_one<Rows>(part, row, part_end);
      }
    }
  }
}

}  // namespace
