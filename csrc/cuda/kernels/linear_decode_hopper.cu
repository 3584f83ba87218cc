// y = x W^T for 1 to 256 rows of x on Hopper, for the storage types without zero points: H, INT8 and INT4.
//
// Layout, cost and reference: see linear_decode_hopper.cuh, and quantized.cuh for the weights.
#include "cuda/kernels/linear_decode_hopper.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace qvl::cuda {
namespace {

// A storage type, parameter `Weights` of linear_decode():
//   kBoxes            boxes of x, 64 values wide, in a step
//   kInRegisters      the weights are integers, converted to H in registers; else read from shared memory
//   kHasGroups        scales per group, applied by add(); else scale() is the factor of a row's sum
//   step_bytes(rows), scale_bytes(rows)
//                     bytes of the values, and of the scales of groups, of `rows` rows of W in a step
//   add()             add a warp's products of a step to sums; products may still be in flight afterwards
struct HalfWeights {
  static constexpr int kBoxes = 1;
  static constexpr bool kInRegisters = false, kHasGroups = false;

  __device__ static int step_bytes(int rows) { return rows * kBoxBytes; }
  __device__ static int scale_bytes(int) { return 0; }

  template <int N, int kSubtiles>
  __device__ static void add(float (&sums)[kSubtiles][N / 2], const Step& step) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int m = 0; m < kSubtiles; ++m) {
        Product<N>::run(sums[m], wgmma_descriptor(step.weights + m * 64 * kBoxBytes) + 2 * k,
                        describe_x<N>(step.x, 16 * k), 1);
      }
    }
    wgmma_commit();
  }

  __device__ static float scale(const LinearHopper&, int) { return 1; }
};

struct Int8Weights {
  static constexpr int kBoxes = 2, kTileBytes = 2048;
  static constexpr bool kInRegisters = true, kHasGroups = false;

  __device__ static int step_bytes(int rows) { return rows / kTileRows * kTileBytes; }
  __device__ static int scale_bytes(int) { return 0; }

  template <int N, int kSubtiles>
  __device__ static void add(float (&sums)[kSubtiles][N / 2], const Step& step) {
#pragma unroll
    for (int m = 0; m < kSubtiles; ++m) {
      const int tile = 4 * m + step.tile;
      const bool valid = kTileRows * tile < step.rows;
      const uint32 from = step.weights + tile * kTileBytes + 16 * step.lane;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32 a[4][4] = {};
        if (valid) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const uint4 w = load_shared16(from + 1024 * half + 512 * c);
            const uint32 rows[2][2] = {{w.x, w.y}, {w.z, w.w}};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
              for (int row = 0; row < 2; ++row) {
                a[2 * c + i][row] = bytes_to_half2(rows[row][i]);
                a[2 * c + i][2 + row] = bytes_to_half2(rows[row][i] >> 8);
              }
            }
          }
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i)
          ProductFromRegisters<N>::run(sums[m], a[i], describe_x<N>(step.x, 64 * half + 16 * i), 1);
        wgmma_commit();
        // With one subtile wait for all products: otherwise the compiler, which sees registers being filled
        // while products are in flight, serialises all of them.
        wgmma_wait<(kSubtiles > 1)>();
      }
    }
  }

  __device__ static float scale(const LinearHopper& p, int row) { return p.row_scales[row]; }
};

template <int group>
struct Int4Weights {
  static constexpr int kBoxes = 2, kTileBytes = 1024, kTileScales = 8 * 4 * (kUnit / group);
  static constexpr bool kInRegisters = true, kHasGroups = true;

  __device__ static int step_bytes(int rows) { return rows / kTileRows * kTileBytes; }
  __device__ static int scale_bytes(int rows) { return rows / kTileRows * kTileScales; }

  // With two buffers (groups of 64, and N <= 16, which leaves enough registers), the sums of a group are
  // folded into the total while the next group's products are in flight.
  template <int N, int kSubtiles>
  __device__ static void add(float (&sums)[kSubtiles][N / 2], const Step& step) {
    constexpr int kTileGroups = kUnit / group, kBuffers = N <= 16 && group == 64 ? 2 : 1;
    float parts[kBuffers][N / 2];
    uint32 scales[kBuffers] = {};
    const auto fold = [&](int i) {
      fold_group(sums[i / kTileGroups], parts[i % kBuffers], low_bfloat16_to_float(scales[i % kBuffers]),
                 high_bfloat16_to_float(scales[i % kBuffers]));
    };
#pragma unroll
    for (int i = 0; i < kSubtiles * kTileGroups; ++i) {
      const int tile = i / kTileGroups * 4 + step.tile, begin = i % kTileGroups * (group / 64);
      const bool valid = kTileRows * tile < step.rows;
#pragma unroll
      for (int half = begin; half < begin + group / 64; ++half) {
        uint32 a[4][4] = {};
        if (valid) {
          const uint4 w = load_shared16(step.weights + tile * kTileBytes + 512 * half + 16 * step.lane);
          const uint32 rows[2][2] = {{w.x, w.y}, {w.z, w.w}};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
              const uint32 run = rows[row][j / 2] >> (8 * (j % 2));
              a[j][row] = nibbles_to_half2(run);
              a[j][2 + row] = nibbles_to_half2(run >> 4);
            }
          }
        }
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ProductFromRegisters<N>::run(parts[i % kBuffers], a[j], describe_x<N>(step.x, 64 * half + 16 * j),
                                       half > begin || j > 0);
        }
      }
      wgmma_commit();
      scales[i % kBuffers] = valid ? load_shared4(step.scales + tile * kTileScales +
                                                  4 * (step.lane / 4 * kTileGroups + i % kTileGroups))
                                   : 0;
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

}  // namespace

// The kernels that linear_decode_hopper.cc chooses from (Kind::max_parts). The numbers are N and kSubtiles.
QVL_HOPPER_WIDE(half, HalfWeights)
QVL_HOPPER(half, HalfWeights, 32, 3)
QVL_HOPPER(half, HalfWeights, 64, 2)
QVL_HOPPER_WIDE(int8, Int8Weights)
QVL_HOPPER_WIDE(int4_g64, Int4Weights<64>)
QVL_HOPPER_WIDE(int4_g128, Int4Weights<128>)

}  // namespace qvl::cuda

#endif
