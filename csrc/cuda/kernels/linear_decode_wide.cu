// y = x W^T for 9 to 256 rows of x, from sm_80 on except on Hopper (linear_decode_hopper.cu), for storage
// types without zero points. Bit-identical to linear_decode.cu, which also computes the products for which no
// block fits shared memory or the blocks would be too few.
//
// Layout. A block (one at a time per multiprocessor) has kRowTiles tiles of 16 rows of W and 32 or 64 rows of
// x, its columns. kRowTiles is 12, 6 or 2: linear_decode.cc chooses the number with the highest utilisation
// of the multiprocessors, a smaller one only if it gains 5 percentage points. With 12 or 6 tiles each warp
// has one, and k advances in units of 128 values, one per stage of a ring in shared memory:
//
//   stage:  x [columns][128 values + 64 bytes]  |  weights [warp][unit]  |  scales [warp]      2 to 6 stages
//              read by all warps                   weights: read by the lane that copied them
//
//              unit 0   unit 1   ..                         columns of x
//   tile 0   | warp 0 | warp 0 |     x   [unit][column]  =  | 8 | 8 | .. |  mma.m16n8k16, kColumnTiles of 8
//   tile 1   | warp 1 | warp 1 |
//
// A warp sums one slice of k at a time, like a warp of linear_decode.cu, and adds the sums of the slices in
// the same order. In a block with two tiles, two warps share a tile: one sums the first half of the slices,
// the other the second half, and a stage has a unit of each half.
//
// Cost. Bytes: each weight once per 32 or 64 rows of x, x once per block from the L2 cache. Operations: 2 * n
// * in * out. Bound by the bytes of the weights up to 64 rows, beyond by the tensor cores; every
// multiprocessor must have weights in flight at all times.
//
// Reference: float64 in PyTorch, tests/cuda/test_decode.py::test_a_product_is_that_of_float64; the same bits
// as for one row: test_a_row_does_not_depend_on_the_others; both on GPUs other than Hopper.
#include "cuda/kernels/linear_decode.cuh"

#if __CUDA_ARCH__ >= 800 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace qvl::cuda {
namespace {

// Maximum shared memory of a block, as shared_limit() in linear_decode.cc.
#if __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kSharedBytes = 227 << 10;
#elif __CUDA_ARCH__ == 800
constexpr int kSharedBytes = 163 << 10;
#else
constexpr int kSharedBytes = 99 << 10;
#endif

// Weights of one unit of a tile, by storage type: the copy to shared memory, and the products with x.
struct HalfUnit {
  static constexpr int kBytes = 4096, kScaleBytes = 0, kGroup = 0;

  __device__ static void copy(const LinearDecode& p, int tile, int unit, int lane, char* to) {
    const int g = lane / 4, k = unit * kUnit + kRun * (lane % 4), row = tile * kTileRows + g;
    const char* from = static_cast<const char*>(p.values) + 2 * (static_cast<int64>(row) * p.stride + k);
    const int64 second = 16 * static_cast<int64>(p.stride);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const bool k_valid = k + 32 * step < p.stride, a = k_valid && row < p.out,
                 b = k_valid && row + 8 < p.out;
      copy_async16(to + 1024 * step, a ? from + 64 * step : p.values, a);
      copy_async16(to + 1024 * step + 512, b ? from + second + 64 * step : p.values, b);
    }
  }

  template <int kColumnTiles>
  __device__ static void add(float (&sums)[kColumnTiles][4], const char* weights, const char*, const char* x,
                             const float*) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint4 a = *reinterpret_cast<const uint4*>(weights + 1024 * step);
      const uint4 b = *reinterpret_cast<const uint4*>(weights + 1024 * step + 512);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const uint4 v = *reinterpret_cast<const uint4*>(x + 8 * j * kColumnBytes + 64 * step);
        multiply(sums[j], a.x, b.x, a.y, b.y, v.x, v.y);
        multiply(sums[j], a.z, b.z, a.w, b.w, v.z, v.w);
      }
    }
  }

  __device__ static float finish(const LinearDecode&, int, float sum) { return sum; }
};

template <int bytes>
struct QuantizedUnit {
  static constexpr int kBytes = bytes;

  __device__ static void copy(const LinearDecode& p, int tile, int unit, int lane, char* to) {
    const bool valid = static_cast<int64>(tile) * kTileRows < p.out;
    const char* from = static_cast<const char*>(p.values) + tile * p.tile_bytes +
                       static_cast<int64>(unit) * bytes + 16 * lane;
#pragma unroll
    for (int i = 0; i < bytes / 512; ++i)
      copy_async16(to + 512 * i, valid ? from + 512 * i : p.values, valid);
  }
};

struct Int8Unit : QuantizedUnit<2048> {
  static constexpr int kScaleBytes = 0, kGroup = 0;

  template <int kColumnTiles>
  __device__ static void add(float (&sums)[kColumnTiles][4], const char* weights, const char*, const char* x,
                             const float*) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint4 w = *reinterpret_cast<const uint4*>(weights + 512 * c);
      const uint32 a[4] = {bytes_to_half2(w.x), bytes_to_half2(w.z), bytes_to_half2(w.x >> 8),
                           bytes_to_half2(w.z >> 8)};
      const uint32 b[4] = {bytes_to_half2(w.y), bytes_to_half2(w.w), bytes_to_half2(w.y >> 8),
                           bytes_to_half2(w.w >> 8)};
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const uint4 v = *reinterpret_cast<const uint4*>(x + 8 * j * kColumnBytes + 64 * c);
        multiply(sums[j], a[0], a[1], a[2], a[3], v.x, v.y);
        multiply(sums[j], b[0], b[1], b[2], b[3], v.z, v.w);
      }
    }
  }

  __device__ static float finish(const LinearDecode& p, int row, float sum) {
    return sum * static_cast<const float*>(p.scales)[row];
  }
};

template <int group>
struct Int4Unit : QuantizedUnit<1024> {
  static constexpr int kScaleBytes = 4 * (kUnit / group), kGroup = group;

  // scales: rows g and g + 8; offsets: columns 2 t and 2 t + 1, [group of the unit][column].
  template <int kColumnTiles>
  __device__ static void add(float (&sums)[kColumnTiles][4], const char* weights, const char* scales,
                             const char* x, const float* offsets) {
    constexpr int kColumns = 8 * kColumnTiles;
    float parts[kColumnTiles][4];  // sums of a group
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 w = *reinterpret_cast<const uint4*>(weights + 512 * c);
      if (64 * c % group == 0) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const float2 begin = *reinterpret_cast<const float2*>(offsets + 64 * c / group * kColumns + 8 * j);
          parts[j][0] = parts[j][2] = begin.x;
          parts[j][1] = parts[j][3] = begin.y;
        }
      }
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const uint32 low = run ? w.y : w.x, high = run ? w.w : w.z;
        uint32 a[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[2 * i] = raw_nibbles(low >> (4 * i));
          a[2 * i + 1] = raw_nibbles(high >> (4 * i));
        }
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const uint4 v = *reinterpret_cast<const uint4*>(x + 8 * j * kColumnBytes + 128 * c + 64 * run);
          multiply(parts[j], a[0], a[1], a[2], a[3], v.x, v.y);
          multiply(parts[j], a[4], a[5], a[6], a[7], v.z, v.w);
        }
      }
      if (64 * (c + 1) % group == 0) {
        const uint32 pair = reinterpret_cast<const uint32*>(scales)[64 * c / group];
        const float first = low_bfloat16_to_float(pair), second = high_bfloat16_to_float(pair);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          sums[j][0] += first * parts[j][0];
          sums[j][1] += first * parts[j][1];
          sums[j][2] += second * parts[j][2];
          sums[j][3] += second * parts[j][3];
        }
      }
    }
  }

  __device__ static float finish(const LinearDecode&, int, float sum) { return sum * (1 / kNibbleUnit); }
};

template <class Unit, int kColumnTiles, int kRowTiles>
__device__ void linear_wide(const LinearDecode& p) {
  constexpr int kSplit = wide_split(kRowTiles), kWideWarps = kRowTiles * kSplit,
                kWideThreads = 32 * kWideWarps;
  constexpr int kColumns = 8 * kColumnTiles, kRows = kRowTiles * kTileRows;
  constexpr int kXBytes = kColumns * kColumnBytes;
  constexpr int kScalesAt = kSplit * kXBytes + kWideWarps * Unit::kBytes;
  constexpr int kGroups = Unit::kGroup ? kUnit / Unit::kGroup : 0;
  constexpr int kStageBytes = wide_stage_bytes(Unit::kBytes, kGroups, kColumns, kRowTiles);
  constexpr int kStages = wide_stages(Unit::kBytes, kGroups, kColumns, kRowTiles, kSharedBytes);
  constexpr int kPairs = kSlices / 2 / kSplit;  // number of pairs of slices that a warp sums
  extern __shared__ uint4 shared[];
  char* const bytes = reinterpret_cast<char*>(shared);
  float* const offsets =
      reinterpret_cast<float*>(bytes + kStages * kStageBytes);  // [kSplit][kGroups][kColumns]
  // Sums of pairs of slices, from the second half of the warps: [tile][pair][column][row].
  float* const pairs = offsets + kSplit * kGroups * kColumns;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int half = warp / kRowTiles, row_tile = warp % kRowTiles;
  const int tile = blockIdx.x * kRowTiles + row_tile;
  const int first = blockIdx.y * kColumns, columns = min(kColumns, p.n - first);
  const int units = (p.in + kUnit - 1) / kUnit;
  // Warps of half 0 sum the first half of the slices, those of half 1 the second half; if kSplit is 1, half 0
  // has all warps and all slices. begin_of: first unit of a half; count: units of the longer half.
  const auto begin_of = [&](int part) { return slice_begin(units, part * (kSlices / kSplit)); };
  int count = 0;
#pragma unroll
  for (int part = 0; part < kSplit; ++part) count = max(count, begin_of(part + 1) - begin_of(part));
  const int from = begin_of(half), to = begin_of(half + 1);

  const auto stage_of = [&](int i) { return bytes + i % kStages * kStageBytes; };
  const auto copy_weights = [&](int i) {
    if (from + i >= to) return;
    char* const stage = stage_of(i);
    Unit::copy(p, tile, from + i, lane, stage + kSplit * kXBytes + warp * Unit::kBytes + 16 * lane);
    if constexpr (Unit::kScaleBytes != 0) {
      const bool valid = tile * kTileRows < p.out;
      const int64 at = (static_cast<int64>(valid ? tile : 0) * units + from + i) * 8 + g;
      if (t == 0)
        copy_async_small<Unit::kScaleBytes>(stage + kScalesAt + (warp * 8 + g) * Unit::kScaleBytes,
                                            static_cast<const char*>(p.scales) + at * Unit::kScaleBytes);
    }
  };
  // Copies runs of 8 values: the values of x from p.in to the next multiple of 8 must be 0 (linear_decode.cu
  // does not read them).
  const auto copy_x = [&](int i) {
#pragma unroll
    for (int part = 0; part < kSplit; ++part) {
      const int unit = begin_of(part) + i;
      if (unit >= begin_of(part + 1)) continue;
      char* const to_part = stage_of(i) + part * kXBytes;
      for (int c = threadIdx.x; c < kColumns * (kUnit / kRun); c += kWideThreads) {
        const int column = c / (kUnit / kRun), run = c % (kUnit / kRun), k = unit * kUnit + kRun * run;
        const bool valid = column < columns && k < p.in;
        const H* source = static_cast<const H*>(p.x) + (first + column) * p.x_stride + k;
        copy_async16(to_part + column * kColumnBytes + 16 * run, valid ? source : p.x, valid);
      }
    }
  };

  for (int i = 0; i < kStages - 1; ++i) copy_weights(i);
  wait_for_predecessors();
  for (int i = 0; i < kStages - 1; ++i) {
    copy_x(i);
    commit_copies();
  }

  float sums[kColumnTiles][4] = {}, even[kColumnTiles][4], total[kColumnTiles][4] = {};
  int slice = half * (kSlices / kSplit);
  // For each slice that consists only of units before `unit` and is not yet closed, add its sums to the
  // total, in pairs of slices as sum_slices() of linear_decode.cu does.
  const auto close_slices = [&](int unit) {
    while (slice < (half + 1) * (kSlices / kSplit) && slice_begin(units, slice + 1) <= unit) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (slice % 2 == 0) {
            even[j][i] = sums[j][i];
          } else if (half == 0) {
            total[j][i] += even[j][i] + sums[j][i];
          } else {
            const int pair = slice / 2 - kPairs, column = 8 * j + 2 * t + i % 2, row = g + i / 2 * 8;
            pairs[((row_tile * kPairs + pair) * kColumns + column) * kTileRows + row] =
                even[j][i] + sums[j][i];
          }
          sums[j][i] = 0;
        }
      }
      ++slice;
    }
  };
  close_slices(from);
  for (int i = 0; i < count; ++i) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    if (i + kStages - 1 < count) {
      copy_weights(i + kStages - 1);
      copy_x(i + kStages - 1);
    } else {
      start_successors();
    }
    commit_copies();
    const char* const stage = stage_of(i);
    if constexpr (kGroups != 0) {
      constexpr int kLanes = Unit::kGroup / kRun;
#pragma unroll
      for (int part = 0; part < kSplit; ++part) {
        for (int c = threadIdx.x; c < kColumns * (kUnit / kRun); c += kWideThreads) {
          const int column = c / (kUnit / kRun), run = c % (kUnit / kRun);
          float sum = sum_of_run(
              *reinterpret_cast<const uint4*>(stage + part * kXBytes + column * kColumnBytes + 16 * run));
#pragma unroll
          for (int distance = kLanes / 2; distance > 0; distance /= 2)
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
          if (run % kLanes == 0)
            offsets[(part * kGroups + run / kLanes) * kColumns + column] = -kNibbleOffset * sum;
        }
      }
      __syncthreads();
    }
    if (from + i < to) {
      Unit::template add<kColumnTiles>(sums, stage + kSplit * kXBytes + warp * Unit::kBytes + 16 * lane,
                                       stage + kScalesAt + (warp * 8 + g) * Unit::kScaleBytes,
                                       stage + half * kXBytes + g * kColumnBytes + 2 * kRun * t,
                                       offsets + half * kGroups * kColumns + 2 * t);
      close_slices(from + i + 1);
    }
  }

  // The warps of the first half add the pairs of the second half, and write the sums to shared memory by
  // column, from where adjacent threads write adjacent values of y.
  constexpr int kPitch = kRows + 2;
  float* const out = reinterpret_cast<float*>(bytes);  // [column][row]
  wait_for_copies<0>();
  __syncthreads();
  if (half == 0) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * j + 2 * t + i % 2, row = g + i / 2 * 8;
        float sum = total[j][i];
        if (kSplit > 1) {
          for (int pair = 0; pair < kPairs; ++pair)
            sum += pairs[((row_tile * kPairs + pair) * kColumns + column) * kTileRows + row];
        }
        out[column * kPitch + row_tile * kTileRows + row] = sum;
      }
    }
  }
  __syncthreads();
  const int step = p.epilogue == kSiluTimes ? 2 : 1, rows = kRows / step;
  for (int i = threadIdx.x; i < columns * rows; i += kWideThreads) {
    const int column = i / rows, local = i % rows * step, row = blockIdx.x * kRows + local;
    if (row >= p.out) continue;
    const auto value = [&](int offset) {
      const float sum = Unit::finish(p, row + offset, out[column * kPitch + local + offset]);
      return p.bias != nullptr ? sum + p.bias[row + offset] : sum;
    };
    write_result(p, row, first + column, value(0), step == 2 ? value(1) : 0.f);
  }
}

}  // namespace

#define QVL_WIDE(name, unit, tiles, rows)                                                     \
  extern "C" __global__ __launch_bounds__(                                                    \
      32 * rows * wide_split(rows),                                                           \
      1) void linear_wide_##name##_##tiles##_##rows(const __grid_constant__ LinearDecode p) { \
    linear_wide<unit, tiles, rows>(p);                                                        \
  }
#define QVL_WIDE_ROWS(name, unit, tiles) \
  QVL_WIDE(name, unit, tiles, 2) QVL_WIDE(name, unit, tiles, 6) QVL_WIDE(name, unit, tiles, 12)
#define QVL_WIDE_ALL(name, unit) QVL_WIDE_ROWS(name, unit, 4) QVL_WIDE_ROWS(name, unit, 8)
QVL_WIDE_ALL(half, HalfUnit)
QVL_WIDE_ALL(int8, Int8Unit)
QVL_WIDE_ALL(int4_g64, Int4Unit<64>)
QVL_WIDE_ALL(int4_g128, Int4Unit<128>)

}  // namespace qvl::cuda

#endif
