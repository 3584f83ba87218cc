// y = x W^T for 1 to 256 rows of x: the products of decode steps and lm_head. Hopper uses
// linear_decode_hopper.cu and linear_decode_hopper_groups.cu instead. For more than 8 rows of x
// linear_decode_wide.cu replaces this kernel, unless the GPU is older than sm_80, the type has zero points,
// or blocks of that kernel do not fit shared memory or would be too few. In these cases each block of this
// kernel has up to 8 of the rows.
//
// Layout. One block per multiprocessor, 16 warps. A tile is 16 rows of W, the rows of mma.m16n8k16, whose 8
// columns are rows of x. k is divided into 16 slices of whole units of 128 values, one slice per warp; a warp
// iterates over its slice, tile by tile:
//
//               k ->  slice 0    slice 1         slice 15
//   tile     16 rows | warp 0  | warp 1  |  ..  | warp 15 |   sums [16][8] of all warps are added in shared
//   next     16 rows | warp 0  | warp 1  |  ..  | warp 15 |   memory: ((0 + 1) + (2 + 3)) + .. in order
//
//   shared memory:  ring [kDepth][16 warps][1 KB] | scales | x [columns][units] | offsets | sums [2][16]
//                   offsets: with 4 bits, the initial sums of groups (linear_decode.cuh)
//                   sums: two buffers, used alternately, with the sums of 16 warps each, of tiles_at_once
//                         tiles: more tiles need fewer barriers
//
// A step is 1 KB of weights, 32 bytes per lane. A lane prefetches its bytes into its own part of a slot of
// the ring, and later reads them as its fragments: loads in flight need neither a barrier nor registers. A
// column's result depends neither on the other columns nor on their number. For the layout of int8 and int4
// see quantized.cuh.
//
// The launcher requests so much shared memory that a multiprocessor has one block at a time. Otherwise, with
// early launches, some multiprocessors get two blocks and others none, which made a chain of products up to a
// third slower than without early launches.
//
// Cost. Bytes: each weight once for up to 8 rows of x; x and y are negligible. time = out * in * bytes per
// weight / bandwidth: at 4.3 TB/s (as on an H200) 4096 x 4096 takes 7.8 us in bfloat16, 2 us with 4 bits, as
// long as the start of a kernel. With early launches (sm_90 and newer) the next kernel therefore starts when
// the last weights have been requested, and fetches its first kDepth - 1 slots, 32 or 64 KB, on each
// multiprocessor that is done. At that bandwidth a multiprocessor can execute 220 warp instructions per KB of
// weights, which is the limit for weights of 4 and 8 bits.
//
// Reference: float64 in PyTorch, tests/cuda/test_decode.py::test_a_product_is_that_of_float64; the same bits
// in every batch: test_a_row_does_not_depend_on_the_others; both on GPUs other than Hopper.
#include "cuda/kernels/linear_decode.cuh"

#ifndef __CUDA_ARCH_FEAT_SM90_ALL

namespace qvl::cuda {
namespace {

constexpr int kWarps = kSlices, kThreads = 32 * kWarps;
constexpr int kStepBytes = 1024;
constexpr int kSumsPitch = 18;  // floats from a column's 16 sums to the next column's; not 16: bank conflicts

// Number of steps in the ring, as in linear_decode.cc.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kDepth = 5;
#elif __CUDA_ARCH__ >= 800
constexpr int kDepth = 3;
#else
constexpr int kDepth = 2;
#endif
constexpr int kSlotBytes = kWarps * kStepBytes;

// Index of a lane, 4 g + t.
struct Lane {
  int index, g, t;
};

// A lane's view of x: run(k) is values k + 8 t to k + 8 t + 7 of column g.
struct Columns {
  const char* row;
  const float2* offsets;  // kSumFactor times the sum of x in a group, for columns 2 t and 2 t + 1
  int offsets_pitch;      // from a group to the next, in float2

  __device__ uint4 run(int k) const { return *reinterpret_cast<const uint4*>(row + 2 * k); }
};

// A lane's next weights to fetch.
struct NextFetch {
  const char* from;
  const char* scales;
  int tile, step;
};

struct HalfWeights {
  static constexpr int kStep = 32;       // values of k in a step
  static constexpr int kScaleBytes = 0;  // of rows g and g + 8 in a step
  static constexpr int kGroup = 0;       // group size for the sums of x; 0: they are not needed

  // Bytes from a lane's weights of a step to those of the next step. A lane has two runs of 16 bytes in a
  // step: first_offset is the offset of the first one in a tile, second_offset that of the second one from
  // the first. in_matrix: whether the lane's run of row g + row of the tile is in the matrix; otherwise zeros
  // are used.
  static constexpr int kStepStride = 2 * kStep;
  __device__ static int64 first_offset(const LinearDecode& p, const Lane& lane) {
    return 2 * (static_cast<int64>(lane.g) * p.stride + kRun * lane.t);
  }
  __device__ static int64 second_offset(const LinearDecode& p) { return 16 * static_cast<int64>(p.stride); }
  __device__ static bool in_matrix(const LinearDecode& p, const NextFetch& next_fetch, const Lane& lane,
                                   int row) {
    return next_fetch.step * kStep + kRun * lane.t < p.stride &&
           next_fetch.tile * kTileRows + lane.g + row < p.out;
  }

  __device__ static void add(float (&sums)[4], const char* slot, const void*, const Columns& x, int step) {
    const uint4 a = *reinterpret_cast<const uint4*>(slot), b = *reinterpret_cast<const uint4*>(slot + 512);
    const uint4 v = x.run(step * kStep);
    multiply(sums, a.x, b.x, a.y, b.y, v.x, v.y);
    multiply(sums, a.z, b.z, a.w, b.w, v.z, v.w);
  }

  __device__ static float finish(const LinearDecode&, int, float sum) { return sum; }
};

// Steps of quantized matrices are contiguous: the first 16 bytes of all lanes, 512 bytes, then the second 16
// bytes.
struct QuantizedWeights {
  static constexpr int kStepStride = kStepBytes;
  __device__ static int64 first_offset(const LinearDecode&, const Lane& lane) { return 16 * lane.index; }
  __device__ static int64 second_offset(const LinearDecode&) { return 512; }
  __device__ static bool in_matrix(const LinearDecode&, const NextFetch&, const Lane&, int) { return true; }
};

struct Int8Weights : QuantizedWeights {
  static constexpr int kStep = 64;
  static constexpr int kScaleBytes = 0;
  static constexpr int kGroup = 0;

  __device__ static void add(float (&sums)[4], const char* slot, const void*, const Columns& x, int step) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 w = *reinterpret_cast<const uint4*>(slot + 512 * c);
      const uint4 v = x.run(step * kStep + 32 * c);
      multiply(sums, bytes_to_half2(w.x), bytes_to_half2(w.z), bytes_to_half2(w.x >> 8),
               bytes_to_half2(w.z >> 8), v.x, v.y);
      multiply(sums, bytes_to_half2(w.y), bytes_to_half2(w.w), bytes_to_half2(w.y >> 8),
               bytes_to_half2(w.w >> 8), v.z, v.w);
    }
  }

  __device__ static float finish(const LinearDecode& p, int row, float sum) {
    return sum * static_cast<const float*>(p.scales)[row];
  }
};

// Add the products of a group to the sums, multiplied by the scales of rows g (`first`) and g + 8 (`second`).
__device__ inline void fold_group(float (&sums)[4], float first, float second, const float (&part)[4]) {
  sums[0] += first * part[0];
  sums[1] += first * part[1];
  sums[2] += second * part[2];
  sums[3] += second * part[3];
}

template <int group>
struct Int4Weights : QuantizedWeights {
  static constexpr int kStep = kUnit;
  static constexpr int kScaleBytes = 4 * (kUnit / group);
  static constexpr int kGroup = group;
  static constexpr float kSumFactor = -kNibbleOffset;  // factor of the sums of x in Columns::offsets

  __device__ static void add(float (&sums)[4], const char* slot, const void* scales, const Columns& x,
                             int step) {
    float part[4];
    __syncwarp();  // the first of four lanes copied the scales
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (64 * c % group == 0) {
        const float2 begin = x.offsets[(step * kUnit + 64 * c) / group * x.offsets_pitch];
        part[0] = part[2] = begin.x;
        part[1] = part[3] = begin.y;
      }
      const uint4 w = *reinterpret_cast<const uint4*>(slot + 512 * c);
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const uint32 low = run ? w.y : w.x, high = run ? w.w : w.z;
        const uint4 v = x.run(step * kStep + 64 * c + 32 * run);
        multiply(part, raw_nibbles(low), raw_nibbles(high), raw_nibbles(low >> 4), raw_nibbles(high >> 4),
                 v.x, v.y);
        multiply(part, raw_nibbles(low >> 8), raw_nibbles(high >> 8), raw_nibbles(low >> 12),
                 raw_nibbles(high >> 12), v.z, v.w);
      }
      if (64 * (c + 1) % group == 0) {
        const uint32 pair = static_cast<const uint32*>(scales)[64 * c / group];
        fold_group(sums, low_bfloat16_to_float(pair), high_bfloat16_to_float(pair), part);
      }
    }
  }

  __device__ static float finish(const LinearDecode&, int, float sum) { return sum * (1 / kNibbleUnit); }
};

template <int group>
struct Uint4Weights : QuantizedWeights {
  static constexpr int kStep = kUnit;
  static constexpr int kScaleBytes = 8 * (kUnit / group);
  static constexpr int kGroup = group;
  static constexpr float kSumFactor = -1;

  __device__ static void add(float (&sums)[4], const char* slot, const void* scales, const Columns& x,
                             int step) {
    float part[4];
    uint2 words = make_uint2(0, 0);
    __syncwarp();  // the first of four lanes copied the scales
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int k = 32 * quarter;
      if (k % group == 0) {
        words = static_cast<const uint2*>(scales)[k / group];
        const float2 sum = x.offsets[(step * kUnit + k) / group * x.offsets_pitch];
        const float2 zeros = to_float2(half2_from_bits(words.y));
        const float first = raw_zero_point(zeros.x), second = raw_zero_point(zeros.y);
        part[0] = first * sum.x;
        part[1] = first * sum.y;
        part[2] = second * sum.x;
        part[3] = second * sum.y;
      }
      const uint4 w = *reinterpret_cast<const uint4*>(slot + 512 * (quarter / 2));
      const uint32 low = quarter % 2 ? w.y : w.x, high = quarter % 2 ? w.w : w.z;
      const uint4 v = x.run(step * kStep + k);
      multiply(part, raw_nibbles(low), raw_nibbles(high), raw_nibbles(low >> 4), raw_nibbles(high >> 4), v.x,
               v.y);
      multiply(part, raw_nibbles(low >> 8), raw_nibbles(high >> 8), raw_nibbles(low >> 12),
               raw_nibbles(high >> 12), v.z, v.w);
      if ((k + 32) % group == 0)
        fold_group(sums, low_float16_to_float(words.x), high_float16_to_float(words.x), part);
    }
  }

  __device__ static float finish(const LinearDecode&, int, float sum) { return sum * (1 / kNibbleUnit); }
};

template <int group>
struct Uint8Weights : QuantizedWeights {
  static constexpr int kStep = 64;
  static constexpr int kScaleBytes = 8 * (kStep / group);
  static constexpr int kGroup = 0;

  __device__ static void add(float (&sums)[4], const char* slot, const void* scales, const Columns& x,
                             int step) {
    float part[4];
    uint2 words = make_uint2(0, 0);
    __syncwarp();  // the first of four lanes copied the scales
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (32 * c % group == 0) {
        words = static_cast<const uint2*>(scales)[32 * c / group];
        part[0] = part[1] = part[2] = part[3] = 0;
      }
      const uint32 first = repeat_low(words.y), second = repeat_high(words.y);
      const uint4 w = *reinterpret_cast<const uint4*>(slot + 512 * c);
      const uint4 v = x.run(step * kStep + 32 * c);
      multiply(part, bytes_to_half2(w.x, first), bytes_to_half2(w.z, second), bytes_to_half2(w.x >> 8, first),
               bytes_to_half2(w.z >> 8, second), v.x, v.y);
      multiply(part, bytes_to_half2(w.y, first), bytes_to_half2(w.w, second), bytes_to_half2(w.y >> 8, first),
               bytes_to_half2(w.w >> 8, second), v.z, v.w);
      if (32 * (c + 1) % group == 0)
        fold_group(sums, low_float16_to_float(words.x), high_float16_to_float(words.x), part);
    }
  }

  __device__ static float finish(const LinearDecode&, int, float sum) { return sum; }
};

// Load eight values of a row of x from k on; zeros beyond its end.
__device__ inline uint4 load_x(const LinearDecode& p, int row, int k) {
  const H* from = static_cast<const H*>(p.x) + row * p.x_stride + k;
  if (k + kRun <= p.in && reinterpret_cast<uint64>(from) % 16 == 0)
    return __ldcg(reinterpret_cast<const uint4*>(from));
  uint4 run = make_uint4(0, 0, 0, 0);
  for (int i = 0; i < kRun && k + i < p.in; ++i)
    reinterpret_cast<uint16*>(&run)[i] = __ldcg(reinterpret_cast<const uint16*>(from) + i);
  return run;
}

// Sum over all slices. sums: that of slice 0; those of successive slices are `pitch` floats apart.
__device__ inline float sum_slices(const float* sums, int pitch) {
  float sum = 0;
#pragma unroll
  for (int slice = 0; slice < kSlices; slice += 2) sum += sums[slice * pitch] + sums[(slice + 1) * pitch];
  return sum;
}

// Write a result. local_row: index of the row in the tile, or for kSiluTimes of the pair of rows. column: row
// of x.
template <class Weights>
__device__ void write_sums(const LinearDecode& p, const float* sums, int pitch, int tile, int local_row,
                           int64 column) {
  const int step = p.epilogue == kSiluTimes ? 2 : 1, row = tile * kTileRows + step * local_row;
  if (row >= p.out) return;
  const auto value = [&](int i) {
    const float sum = Weights::finish(p, row + i, sum_slices(sums + step * local_row + i, pitch));
    return p.bias != nullptr ? sum + p.bias[row + i] : sum;
  };
  write_result(p, row, column, value(0), step == 2 ? value(1) : 0.f);
}

template <class Weights>
__device__ void linear_decode(const LinearDecode& p) {
  constexpr int kStepsOfUnit = kUnit / Weights::kStep;
  extern __shared__ uint4 shared[];
  char* const bytes = reinterpret_cast<char*>(shared);
  const int warp = threadIdx.x / 32;
  const Lane lane{static_cast<int>(threadIdx.x % 32), static_cast<int>(threadIdx.x % 32 / 4),
                  static_cast<int>(threadIdx.x % 4)};

  // This warp's slice, in steps, and the block's tiles.
  const int units = (p.in + kUnit - 1) / kUnit;
  const int from = units * warp / kSlices * kStepsOfUnit, to = units * (warp + 1) / kSlices * kStepsOfUnit;
  const int tiles = (p.out + kTileRows - 1) / kTileRows;
  const int first_tile = blockIdx.x, tile_stride = gridDim.x;

  const int64 tile_bytes = p.tile_bytes, second_offset = Weights::second_offset(p);
  const int64 tile_scales = static_cast<int64>(units) * kStepsOfUnit * 8 * Weights::kScaleBytes;
  // A warp whose slice is empty (fewer than 16 units) fetches nothing: it begins after the last tile.
  NextFetch next_fetch{static_cast<const char*>(p.values) + first_tile * tile_bytes +
                           Weights::first_offset(p, lane) + static_cast<int64>(from) * Weights::kStepStride,
                       static_cast<const char*>(p.scales) + first_tile * tile_scales +
                           (static_cast<int64>(from) * 8 + lane.g) * Weights::kScaleBytes,
                       from < to ? first_tile : tiles, from};
  const auto advance = [&](NextFetch& at) {
    at.from += Weights::kStepStride;
    at.scales += 8 * Weights::kScaleBytes;
    if (++at.step == to) {
      at.step = from;
      at.tile += tile_stride;
      at.from += tile_stride * tile_bytes - static_cast<int64>(to - from) * Weights::kStepStride;
      at.scales += tile_stride * tile_scales - static_cast<int64>(to - from) * 8 * Weights::kScaleBytes;
      return at.tile >= tiles;
    }
    return false;
  };
  char* const ring = bytes + warp * kStepBytes + 16 * lane.index;
  char* const scales = bytes + p.scales_at + (warp * 8 + lane.g) * Weights::kScaleBytes;
  constexpr int kScalePitch = kWarps * 8 * Weights::kScaleBytes;
  const auto fetch = [&](int slot) {
    if (next_fetch.tile < tiles) {
      char* const to_slot = ring + slot * kSlotBytes;
      const bool a = Weights::in_matrix(p, next_fetch, lane, 0),
                 b = Weights::in_matrix(p, next_fetch, lane, 8);
      copy_async16(to_slot, a ? next_fetch.from : p.values, a);
      copy_async16(to_slot + 512, b ? next_fetch.from + second_offset : p.values, b);
      if (Weights::kScaleBytes != 0 && lane.t == 0) {
        constexpr int kPart = Weights::kScaleBytes < 8 ? 4 : 8;
#pragma unroll
        for (int i = 0; i < Weights::kScaleBytes; i += kPart)
          copy_async_small<kPart>(scales + slot * kScalePitch + i, next_fetch.scales + i);
      }
      if (advance(next_fetch)) start_successors();
    }
    commit_copies();  // after the last tile an empty group, since wait_for_copies() counts groups
  };
  for (int i = 0; i < kDepth - 1; ++i) fetch(i);
  wait_for_predecessors();
  const int first = blockIdx.y * p.columns, columns = min(p.columns, p.n - first);
  char* const x_bytes = bytes + p.x_at;
  float* const offsets = reinterpret_cast<float*>(bytes + p.offsets_at);
  const int end = to * Weights::kStep / kRun;
  for (int column = 0; column < columns; ++column) {
    for (int start = from * Weights::kStep / kRun; start < end; start += 32) {
      const int i = start + lane.index;
      uint4 run = make_uint4(0, 0, 0, 0);
      if (i < end) {
        run = load_x(p, first + column, kRun * i);
        *reinterpret_cast<uint4*>(x_bytes + column * p.x_pitch + 16 * i) = run;
      }
      if constexpr (Weights::kGroup != 0) {
        constexpr int kLanes = Weights::kGroup / kRun;
        float sum = sum_of_run(run);
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2)
          sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
        if (lane.index % kLanes == 0 && i < end)
          offsets[i / kLanes * p.offsets_pitch + column] = Weights::kSumFactor * sum;
      }
    }
  }
  __syncwarp();
  Columns x;  // columns beyond the last one repeat it, and are not written
  x.row = x_bytes + min(lane.g, columns - 1) * p.x_pitch + 2 * kRun * lane.t;
  x.offsets_pitch = p.offsets_pitch / 2;
  x.offsets = reinterpret_cast<const float2*>(offsets) + min(lane.t, x.offsets_pitch - 1);

  int slot = 0, refill_slot = kDepth - 1;
  float* sums = reinterpret_cast<float*>(bytes + p.sums_at);
  // Floats from the sums of a tile, and of a slice, to those of the next.
  const int tile_sums = columns * kSumsPitch, pitch = p.tiles_at_once * tile_sums;
  int other_half = kSlices * pitch;  // offset between the halves of the sums' double buffer
  const int rows = p.epilogue == kSiluTimes ? kTileRows / 2 : kTileRows;
  for (int next = first_tile; next < tiles; next += p.tiles_at_once * tile_stride) {
    const int n_tiles = min(p.tiles_at_once, (tiles - next + tile_stride - 1) / tile_stride);
    for (int j = 0; j < n_tiles; ++j) {
      float part[4] = {};
      for (int step = from; step < to; ++step) {
        wait_for_copies<kDepth - 2>();
        Weights::add(part, ring + slot * kSlotBytes, scales + slot * kScalePitch, x, step);
        // Refill the slot of the preceding step: all lanes have used its scales.
        fetch(refill_slot);
        refill_slot = slot;
        slot = slot + 1 == kDepth ? 0 : slot + 1;
      }
      float* const warp_sums = sums + warp * pitch + j * tile_sums + lane.g;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 2 * lane.t + i;
        if (column >= columns) continue;
        warp_sums[column * kSumsPitch] = part[i];
        warp_sums[column * kSumsPitch + 8] = part[i + 2];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_tiles * columns * rows; i += kThreads) {
      const int local_row = i % rows, j = i / rows / columns, column = i / rows % columns;
      write_sums<Weights>(p, sums + j * tile_sums + column * kSumsPitch, pitch, next + j * tile_stride,
                          local_row, first + column);
    }
    sums += other_half;
    other_half = -other_half;
  }
}

}  // namespace

#define QVL_LINEAR_DECODE(name, weights)                                       \
  extern "C" __global__ __launch_bounds__(kThreads) void linear_decode_##name( \
      const __grid_constant__ LinearDecode p) {                                \
    linear_decode<weights>(p);                                                 \
  }
QVL_LINEAR_DECODE(half, HalfWeights)
QVL_LINEAR_DECODE(int8, Int8Weights)
QVL_LINEAR_DECODE(int4_g64, Int4Weights<64>)
QVL_LINEAR_DECODE(int4_g128, Int4Weights<128>)
QVL_LINEAR_DECODE(uint4_g32, Uint4Weights<32>)
QVL_LINEAR_DECODE(uint4_g64, Uint4Weights<64>)
QVL_LINEAR_DECODE(uint4_g128, Uint4Weights<128>)
QVL_LINEAR_DECODE(uint8_g32, Uint8Weights<32>)
QVL_LINEAR_DECODE(uint8_g64, Uint8Weights<64>)  // also groups of 128, stored as two of 64 (upload_matrix.cu)
#undef QVL_LINEAR_DECODE

}  // namespace qvl::cuda

#endif
