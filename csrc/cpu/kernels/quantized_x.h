// Quantization of activations to 8 bits, so that products with 8- and 4-bit weights are sums of integers.
//
// Layout. A block is 8 vectors of 4 * L bytes (L = kLanes): 128, 256 or 512 values. multiply_add (simd.h)
// multiplies and adds the 4 bytes of each 32-bit lane. A lane thus processes 4 bytes of each vector, 32
// values of a block, and these 32 values share a float32 scale. This is as precise as a scale per 32 adjacent
// values, and a single vector multiplication applies the scales to the sums of all lanes:
//
//   lane        0          1        ..    L-1
//   vector 0  x x x x    x x x x         x x x x
//   vector 1  x x x x    x x x x         x x x x      value = integer * scale[lane]
//     ..                                              scale[lane] = largest magnitude of its values / 127
//   vector 7  x x x x    x x x x         x x x x
//
//   a block in memory:  float32 scales [L] | int32 initial sums [kBlock / Group][L] | int8 values [kBlock]
//   prepared x:         [n_x][ceil(k / kBlock)] blocks, padded with zeros
//
// multiply_add takes the weights as unsigned bytes, w + offset: int4 weights are stored with the offset 8,
// and int8 kernels add 128 (except with kSignedProducts of simd.h). The offset is subtracted from the result:
// sum(w * x) = sum((w + offset) * x) - offset * sum(x). The initial sums are -offset times the sum of x over
// each Group of weights that share a scale, computed once for all rows of W. For types with zero points a
// block has no initial sums (matvec_groups.h).
//
// Cost: reads k values and writes QuantizedX::kBytes per block and row of x (1.25 bytes per value for int8,
// up to 2.1 for int4 in groups of 64), once for all rows of W. The rounding error is at most 1/254 of the
// largest of the 32 values.
//
// Reference: rounded_activations in tests/csrc/test_kernels.py, a NumPy version of the same rounding.
#pragma once

#include "cpu/kernels/matvec.h"

namespace {

constexpr int kUnit = 128;  // a quantized row of W is padded to a multiple of this many values
constexpr int kVector = sizeof(SignedBytes);  // bytes, and thus values, in a vector
constexpr int kBlock = 8 * kVector;           // values in a block

// Layout of a block: Floats scales, Ints initial sums [kBlock / Group], bytes [kBlock]. Group: number of
// weights that share a scale; kBlock for int8, with one scale per row. A row's last block is padded with
// zeros.
template <int Group>
struct QuantizedX {
  static constexpr int kGroups = kBlock / Group;
  static constexpr int64_t kValues = (1 + kGroups) * sizeof(Floats);  // offset of the values
  static constexpr int64_t kBytes = kValues + kBlock;                 // size of a block

  static QVL_INLINE int64_t row_bytes(int k) { return round_up(k, kBlock) / kBlock * kBytes; }
  // The block of activation number x (a row of x, see matvec.h) that contains column `first`.
  static QVL_INLINE const char* block(const Matvec& p, int x, int first) {
    return static_cast<const char*>(p.x) + x * row_bytes(p.k) + first / kBlock * kBytes;
  }
};

// Add block_sums [RowCount][XCount] times the scales of x to sums [RowCount][SumStride]. blocks[n]: the block
// of activation n, which begins with its scales. `assign`: overwrite the sums.
template <int RowCount, int XCount, int SumStride, typename Sums>
QVL_INLINE void add_scaled(const Sums (&block_sums)[RowCount][XCount], const char* const (&blocks)[XCount],
                           bool assign, Floats* sums) {
#pragma GCC unroll 8
  for (int n = 0; n < XCount; ++n) {
    const Floats scale = load<Floats>(blocks[n]);
#pragma GCC unroll 8
    for (int r = 0; r < RowCount; ++r) {
      const Floats value = __builtin_convertvector(block_sums[r][n], Floats);
      Floats& sum = sums[r * SumStride + n];
      sum = assign ? value * scale : sum + value * scale;
    }
  }
}

// Quantize x [kBlock], already in the order of the weights' bytes, to int8 values [kBlock] with scales
// [kLanes].
QVL_INLINE void quantize_values(const float* x, char* to_scales, char* values) {
  Floats maxima[4] = {};
  for (int i = 0; i < kBlock; i += kVector) {
    for (int j = 0; j < 4; ++j) {
      const Floats v = load<Floats>(x + i + j * kLanes);
      maxima[j] = max(maxima[j], max(v, -v));
    }
  }
  // Maximum for each position in a vector of kVector values; 4 positions belong to a lane.
  const float* const magnitudes = reinterpret_cast<const float*>(maxima);
  float scales[kLanes], inverse[kVector];
  for (int lane = 0; lane < kLanes; ++lane) {
    float largest = 0;
    for (int j = 0; j < 4; ++j) {
      const float m = magnitudes[4 * lane + j];
      largest = m > largest ? m : largest;
    }
    // If the lane's maximum is infinite or at most 1e-35, its values become zero: below 3.7e-37 the inverse
    // would overflow.
    const bool usable = largest > 1e-35F && largest < __builtin_inff();
    scales[lane] = usable ? largest / 127.0F : 0.0F;
    for (int j = 0; j < 4; ++j) inverse[4 * lane + j] = usable ? 127.0F / largest : 0.0F;
  }
  __builtin_memcpy(to_scales, scales, sizeof scales);
  for (int i = 0; i < kBlock; i += kLanes) {
    store(values + i, narrow_to_bytes(nearest(load<Floats>(x + i) * load<Floats>(inverse + i % kVector))));
  }
}

// Quantize a block in the layout of QuantizedX.
template <int Group>
QVL_INLINE void quantize_block(const float* x, uint8_t offset, char* block) {
  char* const values = block + QuantizedX<Group>::kValues;
  quantize_values(x, block, values);
  UnsignedBytes offsets;
  for (int i = 0; i < kVector; ++i) offsets[i] = offset;
  for (int g = 0; g < QuantizedX<Group>::kGroups; ++g) {
    Ints sums{};
    for (int i = 0; i < Group; i += kVector) {
      sums = multiply_add(sums, offsets, load<SignedBytes>(values + g * Group + i));
    }
    store(block + (1 + g) * sizeof(Ints), -sums);
  }
}

// Prepare n_x rows of x. order(from, to) permutes the kBlock values of a block to the order of the weights.
template <int Group, typename Order>
QVL_INLINE void prepare_quantized(const float* x, int64_t x_stride, int n_x, int k, uint8_t offset,
                                  void* prepared, Order&& order) {
  char* block = static_cast<char*>(prepared);
  for (int n = 0; n < n_x; ++n, x += x_stride) {
    for (int first = 0; first < k; first += kBlock, block += QuantizedX<Group>::kBytes) {
      float values[kBlock], ordered[kBlock];
      const float* from = x + first;
      if (k - first < kBlock) {
        for (int i = 0; i < kBlock; ++i) values[i] = first + i < k ? from[i] : 0.0F;
        from = values;
      }
      order(from, ordered);
      quantize_block<Group>(ordered, offset, block);
    }
  }
}

}  // namespace
