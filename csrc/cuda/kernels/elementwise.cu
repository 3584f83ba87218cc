// Norm, embedding, and rotary angles with the write to the cache: what lies between the products.
//
// At the 7B geometry a row is 16 KB of float32 or 24 KB of queries, keys and values: nothing beside the
// products' weights. A kernel takes what a launch and one way to memory and back take, 1 to 2 us, as long as
// all loads of a thread are on their way at once. So: weights are read before the predecessors end, a row of
// the norm is held in registers between its two uses, and all sums of a block cross one barrier. For prompts
// of thousands of rows the bytes bound them: 24 KB a row for norms, 48 KB for the rotation, at the rate of
// the L2 cache, where the product before left them.
#include "cuda/kernels/elementwise.h"
#include "cuda/kernels/row_sum.cuh"

namespace qvl::cuda {

// A block a row. kHeld: the width is a multiple of 4 and the row fits the registers of its threads.
template <bool kHeld>
__device__ void rms_norm_row(const RmsNormParams& p) {
  __shared__ float room[32];
  const int width = p.width;
  const float* x = p.x + static_cast<int64>(blockIdx.x) * width;
  H* y = static_cast<H*>(p.y) + static_cast<int64>(blockIdx.x) * width;
  float squares = 0;
  if constexpr (kHeld) {
    float4 weights[kRowVectors], values[kRowVectors];
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      if (i < width) weights[v] = load4(p.weight + i);
    }
    start_successors();
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
    const float scale = 1 / sqrtf(block_sum(squares, room) / static_cast<float>(width) + p.epsilon);
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int i = 4 * (v * blockDim.x + threadIdx.x);
      const float4 a = values[v], w = weights[v];
      if (i < width)
        store4(y + i, a.x * scale * w.x, a.y * scale * w.y, a.z * scale * w.z, a.w * scale * w.w);
    }
  } else {
    start_successors();
    wait_for_predecessors();
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += x[i] * x[i];
    const float scale = 1 / sqrtf(block_sum(squares, room) / static_cast<float>(width) + p.epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x) y[i] = to_half(x[i] * scale * p.weight[i]);
  }
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm_held(const __grid_constant__ RmsNormParams p) {
  rms_norm_row<true>(p);
}

extern "C" __global__ void __launch_bounds__(1024) rms_norm_any(const __grid_constant__ RmsNormParams p) {
  rms_norm_row<false>(p);
}

// `parts` blocks a row, a thread takes 8 values side by side.
extern "C" __global__ void __launch_bounds__(kEmbedThreads) embed(const __grid_constant__ EmbedParams p) {
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  const int first = (part * kEmbedThreads + threadIdx.x) * kEmbedValues;
  float* x = p.x + static_cast<int64>(row) * p.width;
  const uint64 given = p.features != nullptr ? p.features[row] : 0;
  const float* features = reinterpret_cast<const float*>(given);
  const int id = min(max(p.ids[row], 0), p.vocab - 1);
  const H* from = static_cast<const H*>(p.wte) + static_cast<int64>(id) * p.width;
  if (p.width % kEmbedValues == 0 && given % 16 == 0) {
    if (first >= p.width) return;
    float4 low, high;
    if (given != 0) {
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
    x[i] = given != 0 ? features[i] : to_float(from[i]);
}

__device__ inline uint16 bfloat16_bits(float value) {
  const uint32 bits = __float_as_uint(value);
  if (value != value) return static_cast<uint16>(bits >> 16 | 64);
  return static_cast<uint16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // the nearest, even of two
}

__device__ inline uint16 float16_bits(float value) {
  uint16 bits;  // what is out of range becomes the largest value, a NaN stays one
  const float in = value != value ? value : fminf(fmaxf(value, -65504.f), 65504.f);
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(in));
  return bits;
}

// A warp takes the query, key and value of a head of a token. Lane l has the dimensions kStep * l + 32 *
// kStep
// * j and those half a head above, kStep 2 where half a head is even, else 1.
template <int kStep>
struct HeadPart {
  static constexpr int kSteps = kMaxHeadDim / 2 / 32 / kStep;
  float low[kSteps][kStep], high[kSteps][kStep];

  __device__ void load(const H* from, int half) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int d = kStep * (threadIdx.x % 32 + 32 * j);
#pragma unroll
      for (int s = 0; s < kStep; ++s) low[j][s] = high[j][s] = 0;
      if (d >= half) continue;
      if constexpr (kStep == 2) {
        const float2 a = to_float2(*reinterpret_cast<const H2*>(from + d));
        const float2 b = to_float2(*reinterpret_cast<const H2*>(from + half + d));
        low[j][0] = a.x, low[j][1] = a.y, high[j][0] = b.x, high[j][1] = b.y;
      } else {
        low[j][0] = to_float(from[d]);
        high[j][0] = to_float(from[half + d]);
      }
    }
  }

  __device__ void rotate(const HeadPart& angles, float scale) {  // low: cosines, high: sines
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        const float a = low[j][s], b = high[j][s], c = angles.low[j][s], z = angles.high[j][s];
        low[j][s] = (a * c - b * z) * scale;
        high[j][s] = (b * c + a * z) * scale;
      }
    }
  }

  // Each step's dimension with its values: put(dimension, values).
  template <typename Put>
  __device__ void each(int half, Put&& put) const {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int d = kStep * (threadIdx.x % 32 + 32 * j);
      if (d >= half) continue;
      put(d, low[j]);
      put(half + d, high[j]);
    }
  }
};

template <int kStep, typename Value, typename Convert>
__device__ void store_part(const HeadPart<kStep>& part, int half, Value* to, Convert&& convert) {
  part.each(half, [&](int d, const float* values) {
    if constexpr (kStep == 2) {
      struct alignas(2 * sizeof(Value)) Two {
        Value first, second;
      };
      *reinterpret_cast<Two*>(to + d) = Two{convert(values[0]), convert(values[1])};
    } else {
      to[d] = convert(values[0]);
    }
  });
}

// `row`: of [2][heads][block_tokens] in the block.
template <int kStep>
__device__ void store_cached(const RotateParams& p, const HeadPart<kStep>& part, char* block, int row) {
  const int half = p.head_dim / 2;
  const int64 first = static_cast<int64>(row) * p.head_dim;
  switch (p.type) {
    case kCacheFloat32:
      return store_part(part, half, reinterpret_cast<float*>(block) + first, [](float v) { return v; });
    case kCacheBfloat16:
      return store_part(part, half, reinterpret_cast<uint16*>(block) + first, bfloat16_bits);
    case kCacheFloat16:
      return store_part(part, half, reinterpret_cast<uint16*>(block) + first, float16_bits);
    default:
      float most = 0;
      part.each(half, [&](int, const float* values) {
        for (int s = 0; s < kStep; ++s) most = fmaxf(most, fabsf(values[s]));
      });
      most = warp_max(most);
      // The inverse of a denormal would overflow; it counts as zero.
      const bool usable = most > 1e-35f && most < __int_as_float(0x7F800000);
      const float inverse = usable ? 127.f / most : 0.f;
      store_part(part, half, reinterpret_cast<int8*>(block) + first,
                 [=](float v) { return static_cast<int8>(__float2int_rn(v * inverse)); });
      char* scales = block + 2 * static_cast<int64>(p.heads) * p.block_tokens * p.head_dim;
      if (threadIdx.x % 32 == 0) reinterpret_cast<float*>(scales)[row] = usable ? most / 127.f : 0.f;
  }
}

template <int kStep>
__device__ void rotate_head(const RotateParams& p) {
  start_successors();
  wait_for_predecessors();
  const int64 task = static_cast<int64>(blockIdx.x) * kRotateWarps + threadIdx.x / 32;
  if (task >= static_cast<int64>(p.n) * p.heads) return;
  const int token = static_cast<int>(task / p.heads), head = static_cast<int>(task % p.heads);
  const int half = p.head_dim / 2;
  const int64 width = static_cast<int64>(p.heads) * p.head_dim;
  const H* from = static_cast<const H*>(p.qkv) + 3 * width * token + head * p.head_dim;
  HeadPart<kStep> query, key, value, angles;
  query.load(from, half);
  key.load(from + width, half);
  value.load(from + 2 * width, half);
  const int position = p.positions[token];
  const int64 place = (static_cast<int64>(p.angle_tables[token]) * p.max_positions + position) * half;
#pragma unroll
  for (int j = 0; j < HeadPart<kStep>::kSteps; ++j) {
    const int d = kStep * (threadIdx.x % 32 + 32 * j);
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
      angles.low[j][s] = d < half ? p.cos[place + d + s] : 0;
      angles.high[j][s] = d < half ? p.sin[place + d + s] : 0;
    }
  }
  const float scale = p.query_scale[position];
  const int64 table = static_cast<int64>(p.tables[token]) * p.max_blocks;
  const int number = p.blocks[table + position / p.block_tokens], slot = position % p.block_tokens;
  char* block = p.cache + number * p.block_bytes;
  query.rotate(angles, scale);
  key.rotate(angles, 1);
  store_part(query, half, static_cast<H*>(p.q) + width * token + head * p.head_dim, to_half);
  store_cached(p, key, block, head * p.block_tokens + slot);
  store_cached(p, value, block, (p.heads + head) * p.block_tokens + slot);
}

extern "C" __global__ void __launch_bounds__(32 * kRotateWarps)
    rotate_and_store_even(const __grid_constant__ RotateParams p) {
  rotate_head<2>(p);
}

extern "C" __global__ void __launch_bounds__(32 * kRotateWarps)
    rotate_and_store_odd(const __grid_constant__ RotateParams p) {
  rotate_head<1>(p);
}

}  // namespace qvl::cuda
