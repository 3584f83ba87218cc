// Attention of one head with an online softmax: softmax(q k^T) v, tile by tile, in attend_one several tiles
// at a time. Scores are stored only for the current tiles.
//
// Layout. Keys and values of a tile (KvTile) are [token][head_dim]: in a block of the pool, in any storage
// type of the KV cache, or for images float32 rows. Each query has a state, the running maximum m of its
// scores s and the running sum l of e^(s - m), and out, the sum of e^(s - m) * v, which is finally divided by
// l:
//
//              keys ->   tile 0     tile 1     tile 2
//   queries   q0       | s s s s  | s . . .  |          . not visible (causal)
//      |      q1       | s s s s  | s s . .  |          m' = max(m, s), out *= e^(m - m'), l likewise
//      v      q2       | s s s s  | s s s .  |          out += e^(s - m') * v, l += e^(s - m')
//
// Kernels:
//
// - attend, attend_rounded: many queries of a prompt or image. Keys are packed in panels of L tokens
//   [head_dim][L], values in panels of L channels [tokens][L] (L = kLanes). The products are those of gemm.h:
//   s = q k^T, then out += weights * v. attend_rounded multiplies bfloat16.
// - attend_one: one query of a decode step, over up to kMaxKvTile keys in the pool: scores of L keys at a
//   time, one softmax, then the weighted sum of values. attend_merge merges the results of several calls.
//
// Cost. Operations: 4 * head_dim per query and key of a tile, visible or not. attend: bound by the
// multiply-add units; packing a tile costs 2 * head_dim values per key, amortised over up to 256 queries; one
// exponential per query and key. attend_one: reads 2 * head_dim values per key for 4 * head_dim operations, 1
// operation per byte with 16-bit types, and is bound by memory. While it reads the keys of a tile, it
// therefore prefetches the values of the same tile and the keys of the next tile.
//
// Reference: reference::attention (reference/reference.cc), tests/csrc/test_kernels.py::test_attention,
// within 3e-5; attend_rounded within 6 % for scores of about 1.
#pragma once

#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/gemm.h"

namespace {

using qvl::cpu::kMaxKvTile;
using qvl::cpu::KvTile;

constexpr float kMinusInfinity = -__builtin_inff();

void attend_begin(int n_q, int64_t out_stride, float* state, float* out) {
  for (int i = 0; i < n_q; ++i) {
    state[2 * i] = kMinusInfinity;
    state[2 * i + 1] = 0;
  }
  __builtin_memset(out, 0, static_cast<size_t>(n_q * out_stride) * sizeof(float));
}

void attend_end(const float* state, int n_q, int64_t out_stride, float* out) {
  for (int i = 0; i < n_q; ++i, out += out_stride) {
    const float inverse = state[2 * i + 1] > 0 ? 1.0F / state[2 * i + 1] : 0.0F;
    for (int64_t d = 0; d < out_stride; d += kLanes) store(out + d, load<Floats>(out + d) * inverse);
  }
}

void attend_merge(const float* from_state, const float* from, int64_t out_stride, float* state, float* out) {
  const float maximum = from_state[0] > state[0] ? from_state[0] : state[0];
  const float factor = exp(broadcast(state[0] - maximum))[0];
  const float from_factor = exp(broadcast(from_state[0] - maximum))[0];
  state[0] = maximum;
  state[1] = state[1] * factor + from_state[1] * from_factor;
  for (int64_t d = 0; d < out_stride; d += kLanes) {
    store(out + d, load<Floats>(out + d) * factor + load<Floats>(from + d) * from_factor);
  }
}

QVL_INLINE void scale_row(float* out, int64_t width, float factor) {
  for (int64_t d = 0; d < width; d += kLanes) store(out + d, load<Floats>(out + d) * factor);
}

// Convert a query's scores [n] to weights e^(score - maximum), where tokens from index n_visible on get the
// weight 0, rescale state and out to the new maximum, and add the weights to the running sum. The last vector
// of scores may contain anything beyond n.
QVL_INLINE void softmax_tile_row(float* scores, int n, int n_visible, float* state, float* out,
                                 int64_t width) {
  const int end = round_up(n, kLanes);
  if (n_visible <= 0) {
    for (int t = 0; t < end; t += kLanes) store(scores + t, Floats{});
    return;
  }
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Floats maximum = broadcast(kMinusInfinity);
  for (int t = 0; t < end; t += kLanes) {
    const Floats s = select(lane < n_visible - t, load<Floats>(scores + t), broadcast(kMinusInfinity));
    store(scores + t, s);
    maximum = max(maximum, s);
  }
  const float old_maximum = state[0];
  const float new_maximum = largest(maximum) > old_maximum ? largest(maximum) : old_maximum;
  if (new_maximum > old_maximum) {
    const float factor = exp(broadcast(old_maximum - new_maximum))[0];
    state[0] = new_maximum;
    state[1] *= factor;
    scale_row(out, width, factor);
  }
  Floats total{};
  for (int t = 0; t < end; t += kLanes) {
    const Floats weight = exp(load<Floats>(scores + t) - new_maximum);
    store(scores + t, weight);
    total += weight;
  }
  state[1] += sum(total);
}

// Call body with a zero of the tile's storage type, from which a generic lambda takes the type.
template <typename Body>
QVL_INLINE void with_stored_type(const KvTile& tile, Body&& body) {
  switch (tile.dtype) {
    case QVL_FLOAT32:
      return body(float{});
    case QVL_BFLOAT16:
      return body(BFloat16{});
    case QVL_FLOAT16:
      return body(Float16{});
    default:
      return body(int8_t{});
  }
}

// Scale of a token's keys or values; 1 for types without scales.
template <typename Stored>
QVL_INLINE float scale_of(const float* scales, int64_t t) {
  if constexpr (sizeof(Stored) == 1) return scales[t];
  return 1;
}

// Load the first `count` elements as float32; the other lanes are zero.
template <typename Stored>
QVL_INLINE Floats load_elements(const Stored* memory, int count) {
  return count == kLanes ? load_floats(memory) : load_first(memory, count);
}

constexpr int kMaxHeadDim = 512;  // core/config.cc checks it

// Pack the keys of a tile in panels of tokens with `pack`, a pack_panel function of gemm.h.
template <typename Pack>
QVL_INLINE void pack_keys(const KvTile& tile, int head_dim, char* to, size_t panel_bytes, Pack&& pack) {
  with_stored_type(tile, [&](auto type) {
    using Stored = decltype(type);
    const auto* keys = static_cast<const Stored*>(tile.keys);
    for (int t = 0; t < tile.n; t += kLanes, to += panel_bytes) {
      const int n = tile.n - t < kLanes ? tile.n - t : kLanes;
      if constexpr (sizeof(Stored) == sizeof(float)) {
        pack(keys + t * tile.stride, tile.stride, n, head_dim, to);
      } else {
        float rows[kLanes * kMaxHeadDim];
        for (int i = 0; i < n; ++i) {
          const Stored* from = keys + (t + i) * tile.stride;
          const float scale = scale_of<Stored>(tile.key_scales, t + i);
          each_vector64(head_dim, [&](int64_t d, int count) {
            store_first(rows + i * head_dim + d, load_elements(from + d, count) * scale, count);
          });
        }
        pack(rows, head_dim, n, head_dim, to);
      }
    }
  });
}

// For each vector of channels, beginning with channel d, and each token t < n, call put(d, t, values), where
// `values` is that vector of the token's values; zeros for tokens beyond the tile.
template <typename Put>
QVL_INLINE void each_value_vector(const KvTile& tile, int head_dim, int n, Put&& put) {
  with_stored_type(tile, [&](auto type) {
    using Stored = decltype(type);
    const auto* values = static_cast<const Stored*>(tile.values);
    for (int d = 0; d < head_dim; d += kLanes) {
      const int count = head_dim - d < kLanes ? head_dim - d : kLanes;
      for (int t = 0; t < n; ++t) {
        put(d, t,
            t < tile.n
                ? load_elements(values + t * tile.stride + d, count) * scale_of<Stored>(tile.value_scales, t)
                : Floats{});
      }
    }
  });
}

// softmax_tile_row() for each query; query i sees the first visible + i tokens of the tile.
QVL_INLINE void softmax_tile(const KvTile& tile, int64_t visible, int n_q, float* scores, int tokens,
                             float* state, float* out, int64_t out_stride) {
  for (int i = 0; i < n_q; ++i) {
    const int64_t n_visible = visible + i < tile.n ? visible + i : tile.n;
    softmax_tile_row(scores + static_cast<int64_t>(i) * tokens, tile.n, static_cast<int>(n_visible),
                     state + 2 * i, out + i * out_stride, out_stride);
  }
}

size_t attend_scratch_bytes(int head_dim, int n_q, int n_tokens) {
  const size_t tokens = static_cast<size_t>(round_up(n_tokens, kLanes));
  const size_t keys = tokens * static_cast<size_t>(head_dim);
  const size_t values = tokens * static_cast<size_t>(round_up(head_dim, kLanes));
  const size_t floats = keys + values + tokens * static_cast<size_t>(n_q);
  // attend_rounded() also stores queries, with head_dim rounded up to an even number, and weights, in 2 bytes
  // each.
  return floats * sizeof(float) + static_cast<size_t>(n_q) * (tokens + static_cast<size_t>(head_dim) + 1) * 2;
}

void attend(const float* q, int64_t q_stride, int n_q, int head_dim, const KvTile& tile, int64_t visible,
            float* state, float* out, int64_t out_stride, void* scratch) {
  const int tokens = round_up(tile.n, kLanes);
  auto* keys = static_cast<float*>(scratch);                       // panels of tokens, [head_dim][kLanes]
  float* values = keys + static_cast<int64_t>(tokens) * head_dim;  // panels of channels, [tile.n][kLanes]
  float* scores = values + tokens * out_stride;
  const size_t panel_bytes = static_cast<size_t>(head_dim) * sizeof(Floats);
  pack_keys(tile, head_dim, reinterpret_cast<char*>(keys), panel_bytes, pack_panel_f32);
  each_value_vector(tile, head_dim, tile.n, [&](int d, int t, Floats value) {
    store(values + static_cast<int64_t>(d) * tile.n + t * kLanes, value);
  });
  multiply_tile<StepF32>(q, q_stride, n_q, head_dim, keys, panel_bytes, tokens / kLanes, /*assign=*/true,
                         scores, tokens, {});
  softmax_tile(tile, visible, n_q, scores, tokens, state, out, out_stride);
  multiply_tile<StepF32>(scores, tokens, n_q, tile.n, values, static_cast<size_t>(tile.n) * sizeof(Floats),
                         static_cast<int>(out_stride / kLanes), /*assign=*/false, out, out_stride, {});
}

#if defined(__AVX512BF16__)
// attend(), with queries, keys, weights and values rounded to bfloat16.
void attend_rounded(const float* q, int64_t q_stride, int n_q, int head_dim, const KvTile& tile,
                    int64_t visible, float* state, float* out, int64_t out_stride, void* scratch) {
  const int tokens = round_up(tile.n, kLanes), width = round_up(head_dim, 2);
  auto* scores = static_cast<float*>(scratch);
  // Panels of pairs: for values [tokens / 2][kLanes channels], for keys [width / 2][kLanes tokens].
  auto* values = reinterpret_cast<uint32_t*>(scores + int64_t{n_q} * tokens);
  auto* keys = values + out_stride * (tokens / 2);
  auto* queries = reinterpret_cast<uint16_t*>(keys + int64_t{tokens} * (width / 2));
  uint16_t* weights = queries + int64_t{n_q} * width;
  const size_t panel_bytes = static_cast<size_t>(width / 2) * sizeof(Words);
  pack_keys(tile, head_dim, reinterpret_cast<char*>(keys), panel_bytes, pack_panel_bf16);
  Words even_token{};
  each_value_vector(tile, head_dim, tokens, [&](int d, int t, Floats value) {
    const Words half = widen_halves(narrow(value));
    if (t % 2 == 0) {
      even_token = half;
    } else {
      store(values + int64_t{d} * (tokens / 2) + t / 2 * kLanes, even_token | half << 16);
    }
  });
  for (int i = 0; i < n_q; ++i) {
    narrow_all(q + i * q_stride, queries + int64_t{i} * width, head_dim);
    if (width > head_dim) queries[int64_t{i} * width + head_dim] = 0;
  }
  multiply_tile<StepBf16>(queries, width, n_q, width, keys, panel_bytes, tokens / kLanes, /*assign=*/true,
                          scores, tokens, {});
  softmax_tile(tile, visible, n_q, scores, tokens, state, out, out_stride);
  narrow_all(scores, weights, int64_t{n_q} * tokens);
  multiply_tile<StepBf16>(weights, tokens, n_q, tokens, values,
                          static_cast<size_t>(tokens / 2) * sizeof(Words),
                          static_cast<int>(out_stride / kLanes), /*assign=*/false, out, out_stride, {});
}
#endif

// Compute the scores of a tile's tokens, kLanes at a time; the last vector is stored completely. Prefetches
// the values of these tokens and the keys of the next tile.
template <typename Stored>
QVL_INLINE void score_keys(const float* q, int head_dim, const KvTile& tile, const void* next,
                           float* scores) {
  const auto* keys = static_cast<const Stored*>(tile.keys);
  const auto* values = static_cast<const Stored*>(tile.values);
  const auto* next_keys = static_cast<const Stored*>(next);
  for (int t = 0; t < tile.n; t += kLanes) {
    // Index of the last key; lanes beyond the tile repeat it.
    const int last = tile.n - t < kLanes ? tile.n - t - 1 : kLanes - 1;
    Floats dots[kLanes] = {};
    each_vector64(head_dim, [&](int64_t d, int count) {
      const Floats part = load_first(q + d, count);
      const Stored* key = keys + t * tile.stride + d;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        dots[i] += part * load_elements(key, count);
        key += i < last ? tile.stride : 0;
      }
    });
    for (int64_t i = 0; i < (last + 1) * tile.stride; i += 64 / sizeof(Stored)) {
      prefetch(values + t * tile.stride + i);
      prefetch(next_keys + t * tile.stride + i);
    }
    Floats total = sums_of(dots);
    if constexpr (sizeof(Stored) == 1) total *= load_first(tile.key_scales + t, last + 1);
    store(scores + t, total);
  }
}

// Add the weighted sum of all tokens' values to VectorCount vectors at `to`. The vectors begin with channel d
// and have `count` channels each.
template <int VectorCount, typename Stored>
QVL_INLINE void add_values(const KvTile* tiles, int n_tiles, int64_t d, const float* weights, int count,
                           float* to) {
  Floats totals[VectorCount];
  for (int v = 0; v < VectorCount; ++v) totals[v] = load<Floats>(to + v * kLanes);
  for (const KvTile* tile = tiles; tile != tiles + n_tiles; weights += tile->n, ++tile) {
    const Stored* values = static_cast<const Stored*>(tile->values) + d;
    for (int t = 0; t < tile->n; ++t) {
      const Floats weight = broadcast(weights[t] * scale_of<Stored>(tile->value_scales, t));
      for (int v = 0; v < VectorCount; ++v) {
        totals[v] += load_elements(values + t * tile->stride + v * kLanes, count) * weight;
      }
    }
  }
  for (int v = 0; v < VectorCount; ++v) store(to + v * kLanes, totals[v]);
}

template <typename Stored>
QVL_INLINE void attend_one_typed(const float* q, int head_dim, const KvTile* tiles, int n_tiles, float* state,
                                 float* out) {
  float scores[kMaxKvTile + kLanes];
  int n = 0;
  for (int i = 0; i < n_tiles; n += tiles[i].n, ++i) {
    // After the last tile, prefetch the next head's keys of the first tile, which are read next unless the
    // caller's task has several chunks of keys. They follow those of this head in the block if the tile is
    // full.
    const void* next = i + 1 < n_tiles ? tiles[i + 1].keys
                                       : static_cast<const Stored*>(tiles->keys) + tiles->n * tiles->stride;
    score_keys<Stored>(q, head_dim, tiles[i], next, scores + n);
  }
  softmax_tile_row(scores, n, n, state, out, round_up(head_dim, kLanes));
  // Four vectors at a time, to hide the latency of additions.
  constexpr int kVectorsAtOnce = 4;
  int d = 0;
  for (; d + kVectorsAtOnce * kLanes <= head_dim; d += kVectorsAtOnce * kLanes) {
    add_values<kVectorsAtOnce, Stored>(tiles, n_tiles, d, scores, kLanes, out + d);
  }
  for (; d < head_dim; d += kLanes) {
    const int count = head_dim - d < kLanes ? head_dim - d : kLanes;
    add_values<1, Stored>(tiles, n_tiles, d, scores, count, out + d);
  }
}

void attend_one(const float* q, int head_dim, const KvTile* tiles, int n_tiles, float* state, float* out) {
  with_stored_type(
      *tiles, [&](auto type) { attend_one_typed<decltype(type)>(q, head_dim, tiles, n_tiles, state, out); });
}

}  // namespace
