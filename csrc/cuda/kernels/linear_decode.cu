// y = x W^T for 1 to 256 rows of x, and the layouts of W.
//
// Cost. Bytes: each weight once, 4.3 TB/s on an H200; nothing else counts for few rows. 4096 x 4096 takes 7.8
// us in bfloat16, 2 us with 4 bits: as long as a kernel takes to start. So the next kernel starts early and
// fetches its first 64 KB of weights a multiprocessor while this one ends.
//
// Layout. A block a multiprocessor, 16 warps. A tile is 16 rows of W, the rows of mma.m16n8k16, whose 8
// columns are rows of x. k is cut into 16 slices, a warp each, of whole units of 128; a warp walks along its
// slice of tile after tile. A step is 1 KB of weights, 32 bytes of each lane, which the lane copies ahead
// into its own place in a ring in shared memory and reads back as its fragments: no barrier, no register is
// held by a load under way. Sums of the slices meet in shared memory, added in a fixed order: ((0 + 1) + (2 +
// 3)) + (4 + 5) and so on. Nothing in a column depends on the other columns, or on how many there are.
#include "cuda/kernels/linear_decode.h"
#include "cuda/kernels/quantised.cuh"
#include "cuda/kernels/stored.cuh"
#include "cuda/kernels/streams.cuh"

namespace qvl::cuda {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kSumsPitch = 20;  // floats of a column's 16 sums: lanes of a warp hit different banks

// Steps in the ring: as in linear_decode.cc.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int kDepth = 5;
#elif __CUDA_ARCH__ >= 800
constexpr int kDepth = 3;
#else
constexpr int kDepth = 2;
#endif

struct Lane {
  int index, g, t;
};

__device__ inline uint4 zero4() {
  return make_uint4(0, 0, 0, 0);
}

// A lane's part of x: the run of values k .. k + 7 of its column.
struct Columns {
  const char* row;
  bool there;

  __device__ uint4 run(int k) const { return there ? *reinterpret_cast<const uint4*>(row + 2 * k) : zero4(); }
};

struct HalfWeights {
  static constexpr int kStep = 32;  // values of k in a step
  static constexpr int kScaleBytes = 0;

  __device__ static void copy(const LinearDecode& p, uint4* slot, void*, int tile, int step,
                              const Lane& lane) {
    const int row = tile * kTileRows + lane.g, k = step * kStep + kRun * lane.t;
    const char* from = static_cast<const char*>(p.values) + 2 * (static_cast<int64>(row) * p.stride + k);
    const bool inside = k < p.stride, first = inside && row < p.out, second = inside && row + 8 < p.out;
    copy_ahead16(slot, first ? from : p.values, first);
    copy_ahead16(slot + 32, second ? from + 16 * static_cast<int64>(p.stride) : p.values, second);
  }

  __device__ static void add(float (&sums)[4], const uint4* slot, const void*, const Columns& x, int step,
                             const Lane& lane) {
    const uint4 a = slot[0], b = slot[32], c = x.run(step * kStep + kRun * lane.t);
    multiply(sums, a.x, b.x, a.y, b.y, c.x, c.y);
    multiply(sums, a.z, b.z, a.w, b.w, c.z, c.w);
  }

  __device__ static float finish(const LinearDecode&, int, float sum) { return sum; }
};

// The 16 bytes of steps of quantised matrices lie one after another.
__device__ inline void copy_step(const LinearDecode& p, uint4* slot, int64 step, const Lane& lane) {
  const uint4* from = static_cast<const uint4*>(p.values) + step * 64 + lane.index;
  copy_ahead16(slot, from, true);
  copy_ahead16(slot + 32, from + 32, true);
}

struct Int8Weights {
  static constexpr int kStep = 64;
  static constexpr int kScaleBytes = 0;

  __device__ static void copy(const LinearDecode& p, uint4* slot, void*, int tile, int step,
                              const Lane& lane) {
    copy_step(p, slot, static_cast<int64>(tile) * (p.stride / kStep) + step, lane);
  }

  __device__ static void add(float (&sums)[4], const uint4* slot, const void*, const Columns& x, int step,
                             const Lane& lane) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 w = slot[32 * c], v = x.run(step * kStep + 32 * c + kRun * lane.t);
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

template <int group>
struct Int4Weights {
  static constexpr int kStep = kUnit;
  static constexpr int kScaleBytes = 4 * (kUnit / group);  // of a row pair in a step

  __device__ static void copy(const LinearDecode& p, uint4* slot, void* scales, int tile, int step,
                              const Lane& lane) {
    const int64 index = static_cast<int64>(tile) * (p.stride / kStep) + step;
    copy_step(p, slot, index, lane);
    if (lane.t == 0)
      copy_ahead<kScaleBytes>(scales,
                              static_cast<const char*>(p.scales) + (index * 8 + lane.g) * kScaleBytes);
  }

  __device__ static void add(float (&sums)[4], const uint4* slot, const void* scales, const Columns& x,
                             int step, const Lane& lane) {
    __syncwarp();  // the scales were copied by the pair's first lane
    float part[4] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 w = slot[32 * c];
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const uint32 a = run ? w.y : w.x, b = run ? w.w : w.z;
        const uint4 v = x.run(step * kStep + 64 * c + 32 * run + kRun * lane.t);
        multiply(part, nibbles_to_half2(a), nibbles_to_half2(b), nibbles_to_half2(a >> 4),
                 nibbles_to_half2(b >> 4), v.x, v.y);
        multiply(part, nibbles_to_half2(a >> 8), nibbles_to_half2(b >> 8), nibbles_to_half2(a >> 12),
                 nibbles_to_half2(b >> 12), v.z, v.w);
      }
      if (64 * (c + 1) % group == 0) {
        const uint32 pair = static_cast<const uint32*>(scales)[64 * c / group];
        sums[0] += low_scale(pair) * part[0];
        sums[1] += low_scale(pair) * part[1];
        sums[2] += high_scale(pair) * part[2];
        sums[3] += high_scale(pair) * part[3];
        part[0] = part[1] = part[2] = part[3] = 0;
      }
    }
  }

  __device__ static float finish(const LinearDecode&, int, float sum) { return sum; }
};

// Eight values of a row of x from k on, zeros behind the row's end.
__device__ inline uint4 load_x(const LinearDecode& p, int row, int k) {
  const H* from = static_cast<const H*>(p.x) + row * p.x_stride + k;
  if (k + kRun <= p.in && reinterpret_cast<uint64>(from) % 16 == 0)
    return __ldcg(reinterpret_cast<const uint4*>(from));
  uint4 run = zero4();
  for (int i = 0; i < kRun && k + i < p.in; ++i)
    reinterpret_cast<uint16*>(&run)[i] = __ldcg(reinterpret_cast<const uint16*>(from) + i);
  return run;
}

// The sum of a row of the tile over the slices: at [slice][column][kSumsPitch] from `sums` on.
__device__ inline float whole_sum(const float* sums, int slice_pitch) {
  float sum = 0;
#pragma unroll
  for (int slice = 0; slice < kWarps; slice += 2)
    sum += sums[slice * slice_pitch] + sums[(slice + 1) * slice_pitch];
  return sum;
}

// As enum class Into of ops.h.
constexpr int kHalf = 0, kFloat = 1, kAdd = 2, kGelu = 3, kSiluTimes = 4;

template <class Weights>
__device__ float finished(const LinearDecode& p, int row, float sum) {
  const float value = Weights::finish(p, row, sum);
  return p.bias != nullptr ? value + p.bias[row] : value;
}

// Write the tile's part of the rows of y from `first` on.
template <class Weights>
__device__ void write_tile(const LinearDecode& p, const float* sums, int tile, int first, int columns) {
  const int slice_pitch = columns * kSumsPitch;
  const int rows = p.into == kSiluTimes ? kTileRows / 2 : kTileRows;
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
    const int column = i / rows, local = i % rows;
    const float* at = sums + column * kSumsPitch;
    if (p.into == kSiluTimes) {
      const int row = tile * kTileRows + 2 * local;
      if (row + 1 >= p.out) continue;
      const float up = finished<Weights>(p, row, whole_sum(at + 2 * local, slice_pitch));
      const float gate = finished<Weights>(p, row + 1, whole_sum(at + 2 * local + 1, slice_pitch));
      static_cast<H*>(p.y)[(first + column) * static_cast<int64>(p.out / 2) + row / 2] =
          to_half(up * (gate / (1 + __expf(-gate))));
      continue;
    }
    const int row = tile * kTileRows + local;
    if (row >= p.out) continue;
    const float value = finished<Weights>(p, row, whole_sum(at + local, slice_pitch));
    const int64 to = (first + column) * static_cast<int64>(p.out) + row;
    switch (p.into) {
      case kHalf:
        static_cast<H*>(p.y)[to] = to_half(value);
        break;
      case kFloat:
        static_cast<float*>(p.y)[to] = value;
        break;
      case kAdd:
        static_cast<float*>(p.y)[to] = __ldcg(static_cast<const float*>(p.y) + to) + value;
        break;
      case kGelu:
        static_cast<H*>(p.y)[to] = to_half(0.5f * value * (1 + erff(value * 0.70710678f)));
    }
  }
}

template <class Weights>
__device__ void linear_decode(const LinearDecode& p) {
  extern __shared__ uint4 shared[];
  char* const bytes = reinterpret_cast<char*>(shared);
  const int warp = threadIdx.x / 32;
  const Lane lane{static_cast<int>(threadIdx.x % 32), static_cast<int>(threadIdx.x % 32 / 4),
                  static_cast<int>(threadIdx.x % 4)};
  start_successors();

  // This warp's slice, in steps.
  const int units = (p.in + kUnit - 1) / kUnit;
  const int from = units * warp / kWarps * (kUnit / Weights::kStep);
  const int to = units * (warp + 1) / kWarps * (kUnit / Weights::kStep);
  const int tiles = (p.out + kTileRows - 1) / kTileRows;

  uint4* const ring = shared + warp * 64 + lane.index;
  char* const scales = bytes + p.scales_at + (warp * 8 + lane.g) * Weights::kScaleBytes;
  constexpr int kScalePitch = kWarps * 8 * Weights::kScaleBytes;
  int ahead_tile = blockIdx.x, ahead_step = from, ahead_slot = 0;
  const auto fetch = [&] {
    if (ahead_tile < tiles && from < to) {
      Weights::copy(p, ring + ahead_slot * (kWarps * 64), scales + ahead_slot * kScalePitch, ahead_tile,
                    ahead_step, lane);
      if (++ahead_step == to) {
        ahead_step = from;
        ahead_tile += gridDim.x;
      }
    }
    ahead_slot = ahead_slot + 1 == kDepth ? 0 : ahead_slot + 1;
    commit_copies();
  };
  for (int i = 0; i < kDepth - 1; ++i) fetch();

  wait_for_predecessors();
  const int first = blockIdx.y * p.columns, columns = min(p.columns, p.n - first);
  {
    const int begin = from * Weights::kStep / kRun, runs = to * Weights::kStep / kRun - begin;
    for (int column = 0; column < columns; ++column)
      for (int i = begin + lane.index; i < begin + runs; i += 32)
        *reinterpret_cast<uint4*>(bytes + p.x_at + column * p.x_pitch + 16 * i) =
            load_x(p, first + column, kRun * i);
    __syncwarp();
  }
  const Columns x{bytes + p.x_at + lane.g * p.x_pitch, lane.g < columns};

  int slot = 0;
  float* sums = reinterpret_cast<float*>(bytes + p.sums_at);
  const int all_sums = kWarps * columns * kSumsPitch;
  int other = all_sums;  // from one half of the sums' double buffer to the other
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float part[4] = {};
    for (int step = from; step < to; ++step) {
      wait_for_copies<kDepth - 2>();
      Weights::add(part, ring + slot * (kWarps * 64), scales + slot * kScalePitch, x, step, lane);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
      fetch();
    }
    float* const mine = sums + warp * columns * kSumsPitch + lane.g;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 2 * lane.t + i;
      if (column >= columns) continue;
      mine[column * kSumsPitch] = part[i];
      mine[column * kSumsPitch + 8] = part[i + 2];
    }
    __syncthreads();
    write_tile<Weights>(p, sums, tile, first, columns);
    sums += other;
    other = -other;
  }
}

}  // namespace

#define QVL_LINEAR_DECODE(name, weights)                                               \
  extern "C" __global__ __launch_bounds__(                                             \
      kThreads, 2) void linear_decode_##name(const __grid_constant__ LinearDecode p) { \
    linear_decode<weights>(p);                                                         \
  }
QVL_LINEAR_DECODE(half, HalfWeights)
QVL_LINEAR_DECODE(int8, Int8Weights)
QVL_LINEAR_DECODE(int4_g64, Int4Weights<64>)
QVL_LINEAR_DECODE(int4_g128, Int4Weights<128>)
#undef QVL_LINEAR_DECODE

// ---- upload: a block a row --------------------------------------------------------------------------------

namespace {

template <typename T>
__device__ void upload_half(const UploadMatrix& p) {
  const int row = blockIdx.x;
  const T* from = static_cast<const T*>(p.from) + static_cast<int64>(row) * p.in;
  H* to = static_cast<H*>(p.values) + (p.first + static_cast<int64>(row) * p.step) * p.stride;
  for (int k = threadIdx.x; k < p.stride; k += blockDim.x)
    to[k] = to_half(k < p.in ? value_of(from[k]) : 0.f);
}

// Row of the matrix that a block writes; it exists in the file or is padding.
__device__ inline int target_row(const UploadMatrix& p, int row) {
  return row < p.rows ? p.first + row * p.step : p.first + (p.rows - 1) * p.step + row - p.rows + 1;
}

template <int group>
__device__ void upload_int4(const UploadMatrix& p) {
  const int row = blockIdx.x, to = target_row(p, row), units = p.stride / kUnit;
  const uint16* from = static_cast<const uint16*>(p.from) + static_cast<int64>(row) * (p.stride / 4);
  for (int i = threadIdx.x; i < p.stride / kRun; i += blockDim.x) {
    // Value 32 j + w of a unit is nibble j of word w, of 16 bits.
    const int k = kRun * i, j = k % kUnit / 32, word = k / kUnit * 32 + k % 32;
    uint32 run = 0;
    for (int v = 0; v < kRun; ++v) {
      const uint32 nibble = row < p.rows ? static_cast<uint32>(from[word + v]) >> (4 * j) & 15u : 8u;
      run |= nibble << (4 * (v % 2 * 4 + v / 2));
    }
    static_cast<uint32*>(p.values)[int4_word(to, k, units)] = run;
  }
  const uint16* scales =
      static_cast<const uint16*>(p.from_scales) + static_cast<int64>(row) * (p.stride / group);
  for (int i = threadIdx.x; i < p.stride / group; i += blockDim.x)
    static_cast<uint16*>(p.scales)[int4_scale(to, i * group, units, group)] =
        row < p.rows ? scales[i] : uint16{0};
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

extern "C" __global__ void upload_matrix_int8(const __grid_constant__ UploadMatrix p) {
  const int row = blockIdx.x, to = target_row(p, row), units = p.stride / kUnit;
  const uint32* from = static_cast<const uint32*>(p.from) + static_cast<int64>(row) * (p.stride / 4);
  for (int i = threadIdx.x; i < p.stride / kRun; i += blockDim.x) {
    uint32* run = static_cast<uint32*>(p.values) + int8_word(to, kRun * i, units);
    for (int half = 0; half < 2; ++half)  // values 0 1 2 3 become 0 2 1 3
      run[half] = row < p.rows ? __byte_perm(from[2 * i + half], 0, 0x3120) : 0u;
  }
  if (threadIdx.x == 0 && row < p.rows)
    static_cast<float*>(p.scales)[to] = static_cast<const float*>(p.from_scales)[row];
}

}  // namespace qvl::cuda
