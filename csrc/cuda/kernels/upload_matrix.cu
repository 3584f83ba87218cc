// Conversion of matrices from the file layout (qvl_packed_bytes in qwenvl.h) to that of the kernels, with one
// block per row of the file and per padding row.
//
// Layout:
//
//   float32, bfloat16, float16 [out, in]  ->  H [out][stride], padded with zeros
//   quantized                             ->  tiles of 16 rows x units of 128 values (quantized.cuh)
//   row r of the file                     ->  row first + r * step; step 2 interleaves two matrices
//   padding rows (quantized only)         ->  the rows after the last one, up to a multiple of 16; zeros
//
// Cost. Bytes: each weight is read and written once when a model is opened. Bound by the copy from the host.
//
// Reference: products with unit vectors return the exact matrix,
// tests/cuda/test_decode.py::test_two_matrices_are_interleaved.
#include "cuda/kernels/linear_decode.h"
#include "cuda/kernels/quantized.cuh"
#include "cuda/kernels/stored.cuh"

namespace qvl::cuda {
namespace {

template <typename T>
__device__ void upload_half(const UploadMatrix& p) {
  const int row = blockIdx.x;
  const T* from = static_cast<const T*>(p.from) + static_cast<int64>(row) * p.in;
  H* to = static_cast<H*>(p.values) + (p.first + static_cast<int64>(row) * p.step) * p.stride;
  for (int k = threadIdx.x; k < p.stride; k += blockDim.x)
    to[k] = to_half(k < p.in ? value_of(from[k]) : 0.f);
}

// Row of the matrix that a block writes: the target of its row of the file, or a padding row.
__device__ inline int target_row(const UploadMatrix& p, int row) {
  return row < p.rows ? p.first + row * p.step : p.first + (p.rows - 1) * p.step + row - p.rows + 1;
}

// Write the 4-bit values of a row; padding rows are filled with `padding`, the stored form of 0.
__device__ inline void upload_nibbles(const UploadMatrix& p, const TiledLayout& layout, int row,
                                      int target_index, uint32 padding) {
  const uint16* from = static_cast<const uint16*>(p.from) + static_cast<int64>(row) * (p.stride / 4);
  for (int i = threadIdx.x; i < p.stride / kRun; i += blockDim.x) {
    // Value 32 j + w of a unit is nibble j of 16-bit word w.
    const int k = kRun * i, j = k % kUnit / 32, word = k / kUnit * 32;
    uint32 run = 0;
    for (int v = 0; v < kRun; ++v) {
      const int value = run_value(k % 32 / kRun, v);
      const uint32 nibble = row < p.rows ? static_cast<uint32>(from[word + value]) >> (4 * j) & 15u : padding;
      run |= nibble << (4 * (v % 2 * 4 + v / 2));
    }
    static_cast<uint32*>(p.values)[layout.int4_word(target_index, k)] = run;
  }
}

// Write the 8-bit values of a row, with the bits of `flip` inverted: 0x80 subtracts 128 from unsigned values.
__device__ inline void upload_bytes(const UploadMatrix& p, const TiledLayout& layout, int row,
                                    int target_index, uint32 flip) {
  const uint8* from = static_cast<const uint8*>(p.from) + static_cast<int64>(row) * p.stride;
  for (int i = threadIdx.x; i < p.stride / kRun; i += blockDim.x) {
    const int k = kRun * i;
    uint32* run = static_cast<uint32*>(p.values) + layout.int8_word(target_index, k);
    for (int half = 0; half < 2; ++half) {
      uint32 word = 0;
      for (int v = 0; v < 4; ++v) {
        const int position = v % 2 * 2 + v / 2;  // values 0 1 2 3 become 0 2 1 3
        const uint32 value = row < p.rows ? from[k / 32 * 32 + run_value(k % 32 / kRun, 4 * half + v)] : 0u;
        word |= (value ^ flip) << (8 * position);
      }
      run[half] = word;
    }
  }
}

template <int group>
__device__ void upload_int4(const UploadMatrix& p) {
  const int row = blockIdx.x, target_index = target_row(p, row);
  const TiledLayout layout(p.stride, p.out);
  upload_nibbles(p, layout, row, target_index, 8);
  const uint16* scales =
      static_cast<const uint16*>(p.from_scales) + static_cast<int64>(row) * (p.stride / group);
  for (int i = threadIdx.x; i < p.stride / group; i += blockDim.x)
    static_cast<uint16*>(p.scales)[layout.int4_scale(target_index, i * group, group)] =
        row < p.rows ? scales[i] : uint16{0};
}

// Write a row of a type with zero points. Scales and zero points of groups longer than a span (kSpan of
// quantized.cuh), that is, of uint8_g128, are repeated for each span.
template <int bits, int file_group>
__device__ void upload_groups(const UploadMatrix& p) {
  constexpr int kGroup = file_group < kSpan<bits> ? file_group : kSpan<bits>;
  const int row = blockIdx.x, target_index = target_row(p, row);
  const TiledLayout layout(p.stride, p.out);
  if (bits == 4) {
    upload_nibbles(p, layout, row, target_index, 0);
  } else {
    upload_bytes(p, layout, row, target_index, 0x80);
  }
  const int groups = p.stride / file_group;
  const uint16* scales = static_cast<const uint16*>(p.from_scales) + static_cast<int64>(row) * groups;
  const uint16* zeros = scales + static_cast<int64>(p.rows) * groups;
  for (int i = threadIdx.x; i < p.stride / kGroup; i += blockDim.x) {
    const bool in_file = row < p.rows;
    const float zero = in_file ? value_of(Float16Value{zeros[i * kGroup / file_group]}) : 0.f;
    const H zero_bits = to_half(zero + (bits == 4 ? kZeroBase4 : kZeroBase8));
    uint16* const target =
        static_cast<uint16*>(p.scales) + layout.group_scale<bits>(target_index, i * kGroup, kGroup);
    target[0] = in_file ? scales[i * kGroup / file_group] : uint16{0};
    target[2] = reinterpret_cast<const uint16&>(zero_bits);  // as group_scale() describes
  }
}

}  // namespace

extern "C" __global__ void upload_matrix_float32(const __grid_constant__ UploadMatrix p) {
  upload_half<float>(p);
}
extern "C" __global__ void upload_matrix_bfloat16(const __grid_constant__ UploadMatrix p) {
  upload_half<BFloat16Value>(p);
}
extern "C" __global__ void upload_matrix_float16(const __grid_constant__ UploadMatrix p) {
  upload_half<Float16Value>(p);
}
extern "C" __global__ void upload_matrix_int4_g64(const __grid_constant__ UploadMatrix p) {
  upload_int4<64>(p);
}
extern "C" __global__ void upload_matrix_int4_g128(const __grid_constant__ UploadMatrix p) {
  upload_int4<128>(p);
}

#define QVL_UPLOAD_GROUPS(NAME, BITS, GROUP)                                                \
  extern "C" __global__ void upload_matrix_##NAME(const __grid_constant__ UploadMatrix p) { \
    upload_groups<BITS, GROUP>(p);                                                          \
  }
QVL_UPLOAD_GROUPS(uint4_g32, 4, 32)
QVL_UPLOAD_GROUPS(uint4_g64, 4, 64)
QVL_UPLOAD_GROUPS(uint4_g128, 4, 128)
QVL_UPLOAD_GROUPS(uint8_g32, 8, 32)
QVL_UPLOAD_GROUPS(uint8_g64, 8, 64)
QVL_UPLOAD_GROUPS(uint8_g128, 8, 128)
#undef QVL_UPLOAD_GROUPS

extern "C" __global__ void upload_matrix_int8(const __grid_constant__ UploadMatrix p) {
  const int row = blockIdx.x, target_index = target_row(p, row);
  upload_bytes(p, TiledLayout(p.stride, p.out), row, target_index, 0);
  if (threadIdx.x == 0 && row < p.rows)
    static_cast<float*>(p.scales)[target_index] = static_cast<const float*>(p.from_scales)[row];
}

}  // namespace qvl::cuda
