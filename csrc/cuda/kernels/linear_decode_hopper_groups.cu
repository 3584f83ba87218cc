// y = x W^T for 1 to 256 rows of x on Hopper, for the storage types with zero points: UINT4 and UINT8.
//
// Layout: see linear_decode_hopper.cuh, and quantized.cuh for the weights.
//
//   16 bytes of a lane        row g                   row g + 8
//   UINT4, half a unit     | quarter 0 | quarter 1 | quarter 0 | quarter 1 |     4 bytes: for two products
//   UINT8, a quarter       | product 0 | product 1 | product 0 | product 1 |     4 bytes: for one product
//
// The products of a group have a separate accumulator, which is then scaled and added: y += scale * sum. A
// zero point is part of the subtraction that converts an integer to H, and costs no additional instruction,
// except with 8 bits in bfloat16.
//
// Cost. Bytes: with 4 bits and groups of 128, 4 bytes of scale and zero point per 64 bytes of values, in
// total 3 % more than INT4, which has no zero points. Instructions: the conversions of quantized.cuh, and
// N / 2 multiply-adds per lane and group.
//
// Reference: see linear_decode_hopper.cuh.
#include "cuda/kernels/linear_decode_hopper.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace qvl::cuda {
namespace {

template <int bits, int group>
struct GroupWeights {
  // In a step: kBoxes boxes of x, 64 values wide; for each tile kTileBytes bytes of values, and kTileScales
  // bytes of scales and zero points.
  static constexpr int kBoxes = 2, kTileBytes = kTileRows * kUnit * bits / 8;
  static constexpr int kTileScales = 8 * 8 * (kUnit / group);
  static constexpr bool kInRegisters = true, kHasGroups = true;

  __device__ static int step_bytes(int rows) { return rows / kTileRows * kTileBytes; }
  __device__ static int scale_bytes(int rows) { return rows / kTileRows * kTileScales; }

  // Address of the scales of the group that begins at value k of a step; its zero points are 4 bytes further.
  __device__ static uint32 scales_at(const Step& step, int tile, int k) {
    constexpr int kValues = kSpan<bits>;
    const int at = (k / kValues * 8 + step.lane / 4) * (kValues / group) + k % kValues / group;
    return step.scales + tile * kTileScales + 8 * at;
  }

  // Convert the quarter that begins at value k of a step to the left operands of two products; w: the lane's
  // 16 bytes that contain the quarter.
  __device__ static void convert(uint32 (*a)[4], const uint4& w, int k, uint32 zeros) {
    const uint32 rows[2][2] = {{w.x, w.y}, {w.z, w.w}};
    const uint32 row_zeros[2] = {repeat_low(zeros), repeat_high(zeros)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (bits == 4) {
          const uint32 run = rows[row][k / 32 % 2] >> (8 * i);
          a[i][row] = nibbles_to_half2(run, row_zeros[row]);
          a[i][2 + row] = nibbles_to_half2(run >> 4, row_zeros[row]);
        } else {
          a[i][row] = bytes_to_half2(rows[row][i], row_zeros[row]);
          a[i][2 + row] = bytes_to_half2(rows[row][i] >> 8, row_zeros[row]);
        }
      }
    }
  }

  // Add the products of all groups to `sums`. With enough registers (two buffers) the sums of a group are
  // folded in while the next group's products are in flight.
  template <int N, int kSubtiles>
  __device__ static void add(float (&sums)[kSubtiles][N / 2], const Step& step) {
    constexpr int kTileGroups = kUnit / group, kBuffers = N <= 16 && group <= 64 ? 2 : 1;
    constexpr int kConverted = group < 64 ? group : 64;  // values converted at a time
    constexpr int kLoaded = bits == 4 ? 64 : 32;         // of a row, in one load of 16 bytes per lane
    float parts[kBuffers][N / 2];
    uint32 scales[kBuffers] = {};
    uint4 w = make_uint4(0, 0, 0, 0);
    const auto fold = [&](int i) {
      fold_group(sums[i / kTileGroups], parts[i % kBuffers], low_float16_to_float(scales[i % kBuffers]),
                 high_float16_to_float(scales[i % kBuffers]));
    };
#pragma unroll
    for (int i = 0; i < kSubtiles * kTileGroups; ++i) {
      const int tile = i / kTileGroups * 4 + step.tile, begin = i % kTileGroups * group;
      const bool valid = kTileRows * tile < step.rows;
      const uint32 zeros = valid ? load_shared4(scales_at(step, tile, begin) + 4) : 0;
#pragma unroll
      for (int k = begin; k < begin + group; k += kConverted) {
        uint32 a[kConverted / 16][4] = {};
        if (valid) {
#pragma unroll
          for (int quarter = k; quarter < k + kConverted; quarter += 32) {
            if (quarter % kLoaded == 0)
              w = load_shared16(step.weights + tile * kTileBytes + 512 * (quarter / kLoaded) +
                                16 * step.lane);
            convert(a + (quarter - k) / 16, w, quarter, zeros);
          }
        }
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < kConverted / 16; ++j) {
          ProductFromRegisters<N>::run(parts[i % kBuffers], a[j], describe_x<N>(step.x, k + 16 * j),
                                       k > begin || j > 0);
        }
      }
      wgmma_commit();
      scales[i % kBuffers] = valid ? load_shared4(scales_at(step, tile, begin)) : 0;
      if (i + 1 < kBuffers) continue;
      wgmma_wait<kBuffers - 1>();
      fold(i + 1 - kBuffers);
    }
    if (kBuffers == 1) return;
    wgmma_wait<0>();
    fold(kSubtiles * kTileGroups - 1);
  }

  __device__ static float scale(const LinearHopper&, int) { return 1; }
};

using Uint4G32 = GroupWeights<4, 32>;
using Uint4G64 = GroupWeights<4, 64>;
using Uint4G128 = GroupWeights<4, 128>;
using Uint8G32 = GroupWeights<8, 32>;
using Uint8G64 = GroupWeights<8, 64>;  // also groups of 128, stored as two of 64 (upload_matrix.cu)

}  // namespace

QVL_HOPPER_WIDE(uint4_g32, Uint4G32)
QVL_HOPPER_WIDE(uint4_g64, Uint4G64)
QVL_HOPPER_WIDE(uint4_g128, Uint4G128)
QVL_HOPPER_WIDE(uint8_g32, Uint8G32)
QVL_HOPPER_WIDE(uint8_g64, Uint8G64)

}  // namespace qvl::cuda

#endif
