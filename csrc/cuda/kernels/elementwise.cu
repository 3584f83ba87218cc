// Kernels between the products: norm, embedding, gathering of columns, and rotary rotation with the write to
// the cache.
//
// Layout:
//
//   rms_norm           a block per row: x float32 [width] -> H [width]. rms_norm_held keeps the row in
//                      registers, float4 v of thread t at 4 * (v * threads + t); sums as in row_sum.cuh
//   embed              `parts` blocks per row: wte H [vocab][width] or features float32 -> x float32 [width]
//   gather_columns     grid [columns / 256][rows]: y[j] = x[order[j]], x H [in] -> H [in], for act-order
//   rotate_and_store   16 or 32 lanes per head of a token; a lane has dimensions d and d + head_dim / 2:
//
//                      qkv H [n][3][heads][head_dim] -> q H [n][heads][head_dim], rotated and scaled, and
//                      the cache [2][heads][block_tokens][head_dim], for int8 with scales
//
// Cost. At the 7B geometry a row has 16 KB of float32 or 24 KB of queries, keys and values, negligible
// compared with the weights of the products. For few rows a kernel takes 1 to 2 us: a launch and one memory
// latency, in embed and rotate_and_store two, since they load from addresses that depend on ids or positions.
// This requires that independent loads of a thread are in flight together. rms_norm_held therefore reads the
// weights before the predecessors end and keeps the row in registers between its two uses, and the sum over a
// block takes one barrier. For prompts of thousands of rows the kernels are bound by bytes read and written,
// 24 KB per row for norms and 48 KB for the rotation, at the bandwidth of the L2 cache, which contains the
// output of the preceding product.
//
// Reference: float64 in PyTorch, tests/cuda/test_elementwise.py.
#include "cuda/kernels/elementwise.h"
#include "cuda/kernels/rotate.cuh"
#include "cuda/kernels/row_sum.cuh"

namespace qvl::cuda {

// RMSNorm of a row by a block. kHeld: the row is kept in registers; fits_registers() of row_threads.h says
// whether its width allows this.
template <bool kHeld>
__device__ void rms_norm_row(const RmsNormParams& p) {
  __shared__ float scratch[32];
  const int width = p.width;
  const float* x = p.x + static_cast<int64>(blockIdx.x) * width;
  H* y = static_cast<H*>(p.y) + static_cast<int64>(blockIdx.x) * width;
  float squares = 0;
  start_successors();
  if constexpr (kHeld) {
    float4 weights[kRowVectors], values[kRowVectors];
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      if (i < width) weights[v] = load4(p.weight + i);
    }
    wait_for_predecessors();
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      values[v] = i < width ? load4(x + i) : float4{0, 0, 0, 0};
    }
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const float4 a = values[v];
      squares += (a.x * a.x + a.y * a.y) + (a.z * a.z + a.w * a.w);
    }
    const float scale = 1 / sqrtf(block_sum(squares, scratch) / static_cast<float>(width) + p.epsilon);
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      const float4 a = values[v], w = weights[v];
      if (i < width)
        store4(y + i, a.x * scale * w.x, a.y * scale * w.y, a.z * scale * w.z, a.w * scale * w.w);
    }
  } else {
    wait_for_predecessors();
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += x[i] * x[i];
    const float scale = 1 / sqrtf(block_sum(squares, scratch) / static_cast<float>(width) + p.epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x) y[i] = to_half(x[i] * scale * p.weight[i]);
  }
}

extern "C" __global__ void __launch_bounds__(1024, kRowBlocks)
    rms_norm_held(const __grid_constant__ RmsNormParams p) {
  rms_norm_row<true>(p);
}

extern "C" __global__ void __launch_bounds__(1024, kRowBlocks)
    rms_norm_any(const __grid_constant__ RmsNormParams p) {
  rms_norm_row<false>(p);
}

// `parts` blocks per row, 8 adjacent values per thread.
extern "C" __global__ void __launch_bounds__(kEmbedThreads) embed(const __grid_constant__ EmbedParams p) {
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  const int first = (part * kEmbedThreads + threadIdx.x) * kEmbedValues;
  float* x = p.x + static_cast<int64>(row) * p.width;
  const uint64 features_address = p.features != nullptr ? p.features[row] : 0;
  const float* features = reinterpret_cast<const float*>(features_address);
  // Ids in memory that the GPU can access have not been checked.
  const int id = min(max(p.ids[row], 0), p.vocab - 1);
  const H* from = static_cast<const H*>(p.wte) + static_cast<int64>(id) * p.width;
  if (p.width % kEmbedValues == 0 && features_address % 16 == 0) {
    if (first >= p.width) return;
    float4 low, high;
    if (features_address != 0) {
      low = load4(features + first);
      high = load4(features + first + 4);
    } else {
      const Half8 values = *reinterpret_cast<const Half8*>(from + first);
      const float2 a = to_float2(values.pairs[0]), b = to_float2(values.pairs[1]);
      const float2 c = to_float2(values.pairs[2]), d = to_float2(values.pairs[3]);
      low = {a.x, a.y, b.x, b.y};
      high = {c.x, c.y, d.x, d.y};
    }
    *reinterpret_cast<float4*>(x + first) = low;
    *reinterpret_cast<float4*>(x + first + 4) = high;
    return;
  }
  for (int i = first; i < min(first + kEmbedValues, p.width); ++i)
    x[i] = features_address != 0 ? features[i] : to_float(from[i]);
}

extern "C" __global__ void __launch_bounds__(kGatherThreads)
    gather_columns(const __grid_constant__ GatherParams p) {
  start_successors();
  const int column = blockIdx.x * kGatherThreads + threadIdx.x;
  const int from = column < p.in ? p.order[column] : 0;
  wait_for_predecessors();
  if (column >= p.in) return;
  const int64 row = blockIdx.y;
  static_cast<H*>(p.y)[row * p.y_stride + column] = static_cast<const H*>(p.x)[row * p.x_stride + from];
}

__device__ inline float to_float(float value) {
  return value;
}

// A lane's part of a head (query, key or value) of a token; kLanes lanes of a warp share the head. A lane has
// kRuns runs of kRunValues adjacent dimensions of the lower half of the head, and the corresponding
// dimensions of the upper half. kRuns * kRunValues * kLanes is at least head_dim / 2.
template <int kRunValues_, int kRuns_, int kLanes_>
struct HeadPart {
  static constexpr int kRunValues = kRunValues_, kRuns = kRuns_, kLanes = kLanes_;
  float low[kRuns][kRunValues], high[kRuns][kRunValues];

  // First dimension of a run, in the lower half.
  __device__ static int dimension(int run) { return kRunValues * (threadIdx.x % kLanes + kLanes * run); }

  // Values of a run in memory.
  template <typename Value>
  struct alignas(kRunValues * sizeof(Value)) Run {
    Value values[kRunValues];
  };

  template <typename Value>
  __device__ void load(const Value* low_source, const Value* high_source, int half) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      const int d = dimension(j);
#pragma unroll
      for (int s = 0; s < kRunValues; ++s) low[j][s] = high[j][s] = 0;
      if (d >= half) continue;
      const auto a = *reinterpret_cast<const Run<Value>*>(low_source + d);
      const auto b = *reinterpret_cast<const Run<Value>*>(high_source + d);
#pragma unroll
      for (int s = 0; s < kRunValues; ++s) {
        low[j][s] = to_float(a.values[s]);
        high[j][s] = to_float(b.values[s]);
      }
    }
  }

  // Rotate, then multiply by `scale`. angles.low: cosines; angles.high: sines.
  __device__ void rotate(const HeadPart& angles, float scale) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
#pragma unroll
      for (int s = 0; s < kRunValues; ++s) {
        const float a = low[j][s], b = high[j][s], cosine = angles.low[j][s], sine = angles.high[j][s];
        low[j][s] = rotated(a, b, cosine, -sine) * scale;
        high[j][s] = rotated(b, a, cosine, sine) * scale;
      }
    }
  }

  template <typename Value, typename Convert>
  __device__ void store(Value* to, int half, Convert&& convert) const {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      const int d = dimension(j);
      if (d >= half) continue;
      Run<Value> a, b;
#pragma unroll
      for (int s = 0; s < kRunValues; ++s) {
        a.values[s] = convert(low[j][s]);
        b.values[s] = convert(high[j][s]);
      }
      *reinterpret_cast<Run<Value>*>(to + d) = a;
      *reinterpret_cast<Run<Value>*>(to + half + d) = b;
    }
  }

  // Largest magnitude of the head, returned in all its lanes.
  __device__ float max_magnitude() const {
    float maximum = 0;
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
#pragma unroll
      for (int s = 0; s < kRunValues; ++s)
        maximum = fmaxf(maximum, fmaxf(fabsf(low[j][s]), fabsf(high[j][s])));
    }
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, distance));
    return maximum;
  }
};

// Store a head of a key or value in the type of the cache. block: the cache block; row: index of the head and
// token in its [2][heads][block_tokens].
template <typename Part>
__device__ void store_cached(const RotateParams& p, const Part& part, char* block, int row) {
  const int half = p.head_dim / 2;
  const int64 first = static_cast<int64>(row) * p.head_dim;
  switch (p.type) {
    case kCacheFloat32:
      return part.store(reinterpret_cast<float*>(block) + first, half, [](float v) { return v; });
    case kCacheBfloat16:
      return part.store(reinterpret_cast<BFloat16Value*>(block) + first, half, bfloat16_of);
    case kCacheFloat16:
      return part.store(reinterpret_cast<Float16Value*>(block) + first, half, float16_of);
    default:
      const Int8Head head(part.max_magnitude());
      part.store(reinterpret_cast<int8*>(block) + first, half, [=](float v) { return head.quantize(v); });
      char* scales = block + 2 * static_cast<int64>(p.heads) * p.block_tokens * p.head_dim;
      if (threadIdx.x % Part::kLanes == 0) reinterpret_cast<float*>(scales)[row] = head.scale;
  }
}

// rotate_and_store of ops.h for one head of a token.
template <typename Part>
__device__ void rotate_head(const RotateParams& p) {
  start_successors();
  wait_for_predecessors();
  const int64 lane_task =
      static_cast<int64>(blockIdx.x) * (blockDim.x / Part::kLanes) + threadIdx.x / Part::kLanes;
  // Lanes beyond the last head repeat it, so that all lanes take part in the shuffles.
  const int64 task = min(lane_task, static_cast<int64>(p.n) * p.heads - 1);
  const int token = static_cast<int>(task / p.heads), head = static_cast<int>(task % p.heads);
  const int half = p.head_dim / 2;
  const int64 width = static_cast<int64>(p.heads) * p.head_dim;
  const H* from = static_cast<const H*>(p.qkv) + 3 * width * token + head * p.head_dim;
  const int position = p.positions[token];
  const int64 angle_table = p.angle_tables[token], table = p.tables[token];
  Part query, key, value, angles;
  query.load(from, from + half, half);
  key.load(from + width, from + width + half, half);
  value.load(from + 2 * width, from + 2 * width + half, half);
  const int64 angle_index = (angle_table * p.max_positions + position) * half;
  angles.load(p.cos + angle_index, p.sin + angle_index, half);
  const float scale = p.query_scale[position];
  const int block_index = p.blocks[table * p.max_blocks + position / p.block_tokens];
  const int slot = position % p.block_tokens;
  char* block = p.cache + block_index * p.block_bytes;
  query.rotate(angles, scale);
  key.rotate(angles, 1);
  query.store(static_cast<H*>(p.q) + width * token + head * p.head_dim, half, to_half);
  store_cached(p, key, block, head * p.block_tokens + slot);
  store_cached(p, value, block, (p.heads + head) * p.block_tokens + slot);
}

// For head_dim 128.
extern "C" __global__ void __launch_bounds__(kRotateThreads)
    rotate_and_store_dim128(const __grid_constant__ RotateParams p) {
  rotate_head<HeadPart<4, 1, 16>>(p);
}

// For head_dim a multiple of 4, up to kMaxHeadDim.
extern "C" __global__ void __launch_bounds__(kRotateThreads)
    rotate_and_store_run2(const __grid_constant__ RotateParams p) {
  rotate_head<HeadPart<2, kMaxHeadDim / 2 / 64, 32>>(p);
}

// For even head_dim, up to kMaxHeadDim.
extern "C" __global__ void __launch_bounds__(kRotateThreads)
    rotate_and_store_run1(const __grid_constant__ RotateParams p) {
  rotate_head<HeadPart<1, kMaxHeadDim / 2 / 32, 32>>(p);
}

}  // namespace qvl::cuda
