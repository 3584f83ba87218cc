// Attention over tiles of keys and values with an online softmax: scores exist for one tile at a time only.
#pragma once

#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/gemm.h"

namespace {

using qvl::cpu::kMaxKvTile;
using qvl::cpu::KvTile;

constexpr float kNothingYet = -__builtin_inff();

void attend_begin(int n_q, int64_t out_stride, float* state, float* out) {
  for (int i = 0; i < n_q; ++i) {
    state[2 * i] = kNothingYet;
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

QVL_INLINE void scale_row(float* out, int64_t width, float by) {
  for (int64_t d = 0; d < width; d += kLanes) store(out + d, load<Floats>(out + d) * by);
}

// Turn a row of scores [n, padded to vectors with anything] into weights e^(score - maximum), zero from
// `seen` on, and correct state and out for the new maximum.
QVL_INLINE void soften(float* scores, int n, int seen, float* state, float* out, int64_t width) {
  const int end = round_up(n, kLanes);
  if (seen <= 0) {
    for (int t = 0; t < end; t += kLanes) store(scores + t, Floats{});
    return;
  }
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Floats most = all(kNothingYet);
  for (int t = 0; t < end; t += kLanes) {
    const Floats s = select(lane < seen - t, load<Floats>(scores + t), all(kNothingYet));
    store(scores + t, s);
    most = max(most, s);
  }
  const float before = state[0], now = largest(most) > before ? largest(most) : before;
  if (now > before) {
    const float shrink = exp(all(before - now))[0];
    state[0] = now;
    state[1] *= shrink;
    scale_row(out, width, shrink);
  }
  Floats total{};
  for (int t = 0; t < end; t += kLanes) {
    const Floats weight = exp(load<Floats>(scores + t) - now);
    store(scores + t, weight);
    total += weight;
  }
  state[1] += sum(total);
}

// `some` elements from i on, zero behind them.
QVL_INLINE Floats elements(const void* memory, qvl_dtype dtype, int64_t i, int some) {
  if (dtype == QVL_FLOAT32) return load_some(static_cast<const float*>(memory) + i, some);
  return widen(load_some_halves(static_cast<const uint16_t*>(memory) + i, some));
}

constexpr int kMaxHeadDim = 512;

// The keys of a tile in panels of tokens, packed by `pack` (gemm.h).
template <typename Pack>
QVL_INLINE void pack_keys(const KvTile& tile, int head_dim, char* to, size_t panel_bytes, Pack&& pack) {
  for (int t = 0; t < tile.n; t += kLanes, to += panel_bytes) {
    const int n = tile.n - t < kLanes ? tile.n - t : kLanes;
    if (tile.dtype == QVL_FLOAT32) {
      pack(static_cast<const float*>(tile.keys) + t * tile.stride, tile.stride, n, head_dim, to);
    } else {
      float rows[kLanes * kMaxHeadDim];
      for (int i = 0; i < n; ++i) {
        widen_all<BFloat16>(static_cast<const uint16_t*>(tile.keys) + (t + i) * tile.stride,
                            rows + i * head_dim, head_dim);
      }
      pack(rows, head_dim, n, head_dim, to);
    }
  }
}

QVL_INLINE void soften_all(const KvTile& tile, int64_t visible, int n_q, float* scores, int tokens,
                           float* state, float* out, int64_t out_stride) {
  for (int i = 0; i < n_q; ++i) {
    const int64_t seen = visible + i < tile.n ? visible + i : tile.n;
    soften(scores + static_cast<int64_t>(i) * tokens, tile.n, static_cast<int>(seen), state + 2 * i,
           out + i * out_stride, out_stride);
  }
}

size_t attend_scratch_bytes(int head_dim, int n_q, int n_tokens) {
  const size_t tokens = static_cast<size_t>(round_up(n_tokens, kLanes));
  const size_t keys = tokens * static_cast<size_t>(head_dim);
  const size_t values = tokens * static_cast<size_t>(round_up(head_dim, kLanes));
  const size_t floats = keys + values + tokens * static_cast<size_t>(n_q);
  // attend_rounded() keeps queries and weights as well, in 2 bytes each.
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
  for (int d = 0; d < head_dim; d += kLanes) {
    const int some = head_dim - d < kLanes ? head_dim - d : kLanes;
    for (int t = 0; t < tile.n; ++t) {
      store(values + static_cast<int64_t>(d) * tile.n + t * kLanes,
            elements(tile.values, tile.dtype, t * tile.stride + d, some));
    }
  }
  multiply_tile<StepF32>(q, q_stride, n_q, head_dim, keys, panel_bytes, tokens / kLanes, true, scores, tokens,
                         {});
  soften_all(tile, visible, n_q, scores, tokens, state, out, out_stride);
  multiply_tile<StepF32>(scores, tokens, n_q, tile.n, values, static_cast<size_t>(tile.n) * sizeof(Floats),
                         static_cast<int>(out_stride / kLanes), false, out, out_stride, {});
}

#if defined(__AVX512BF16__)
// The same with queries, keys, weights and values rounded to bfloat16.
void attend_rounded(const float* q, int64_t q_stride, int n_q, int head_dim, const KvTile& tile,
                    int64_t visible, float* state, float* out, int64_t out_stride, void* scratch) {
  const int tokens = round_up(tile.n, kLanes), width = round_up(head_dim, 2);
  auto* scores = static_cast<float*>(scratch);
  auto* values = reinterpret_cast<uint32_t*>(scores + int64_t{n_q} * tokens);  // pairs [channels][tokens / 2]
  auto* keys = values + out_stride * (tokens / 2);                             // pairs [tokens][width / 2]
  auto* queries = reinterpret_cast<uint16_t*>(keys + int64_t{tokens} * (width / 2));
  uint16_t* weights = queries + int64_t{n_q} * width;
  const size_t panel_bytes = static_cast<size_t>(width / 2) * sizeof(Words);
  pack_keys(tile, head_dim, reinterpret_cast<char*>(keys), panel_bytes, pack_panel_bf16);
  for (int d = 0; d < head_dim; d += kLanes) {
    const int some = head_dim - d < kLanes ? head_dim - d : kLanes;
    uint32_t* to = values + int64_t{d} * (tokens / 2);
    for (int t = 0; t < tokens; t += 2, to += kLanes) {
      const auto row = [&](int i) {
        return i < tile.n ? elements(tile.values, tile.dtype, i * tile.stride + d, some) : Floats{};
      };
      store(to, widen_halves(narrow(row(t))) | widen_halves(narrow(row(t + 1))) << 16);
    }
  }
  for (int i = 0; i < n_q; ++i) {
    narrow_all(q + i * q_stride, queries + int64_t{i} * width, head_dim);
    if (width > head_dim) queries[int64_t{i} * width + head_dim] = 0;
  }
  multiply_tile<StepBf16>(queries, width, n_q, width, keys, panel_bytes, tokens / kLanes, true, scores,
                          tokens, {});
  soften_all(tile, visible, n_q, scores, tokens, state, out, out_stride);
  narrow_all(scores, weights, int64_t{n_q} * tokens);
  multiply_tile<StepBf16>(weights, tokens, n_q, tokens, values,
                          static_cast<size_t>(tokens / 2) * sizeof(Words),
                          static_cast<int>(out_stride / kLanes), false, out, out_stride, {});
}
#endif

constexpr int kTogether = 4;

// to [V vectors] += the values from channel d on, each token's times its weight; `some` channels in a vector.
template <int V>
QVL_INLINE void add_values(const KvTile& tile, const float* weights, int d, int some, float* to) {
  Floats totals[V];
  for (int v = 0; v < V; ++v) totals[v] = load<Floats>(to + v * kLanes);
  for (int t = 0; t < tile.n; ++t) {
    for (int v = 0; v < V; ++v) {
      totals[v] += elements(tile.values, tile.dtype, t * tile.stride + d + v * kLanes, some) * weights[t];
    }
  }
  for (int v = 0; v < V; ++v) store(to + v * kLanes, totals[v]);
}

void attend_one(const float* q, int head_dim, const KvTile& tile, float* state, float* out) {
  float scores[kMaxKvTile + kLanes];
  const int64_t width = round_up(head_dim, kLanes);
  const int whole = head_dim / kLanes * kLanes;
  const int64_t element = tile.dtype == QVL_FLOAT32 ? 4 : 2;
  for (int t = 0; t < tile.n; ++t) {
    const char* values = static_cast<const char*>(tile.values) + t * tile.stride * element;
    for (int64_t i = 0; i < head_dim * element; i += 64) prefetch(values + i);
    Floats dot{};
    for (int d = 0; d < whole; d += kLanes) {
      dot += load<Floats>(q + d) * elements(tile.keys, tile.dtype, t * tile.stride + d, kLanes);
    }
    if (whole < head_dim) {
      const int some = head_dim - whole;
      dot += load_some(q + whole, some) * elements(tile.keys, tile.dtype, t * tile.stride + whole, some);
    }
    scores[t] = sum(dot);
  }
  soften(scores, tile.n, tile.n, state, out, width);
  // Several vectors at once: the additions to each wait for one another.
  int d = 0;
  for (; d + kTogether * kLanes <= head_dim; d += kTogether * kLanes) {
    add_values<kTogether>(tile, scores, d, kLanes, out + d);
  }
  for (; d < head_dim; d += kLanes) {
    add_values<1>(tile, scores, d, head_dim - d < kLanes ? head_dim - d : kLanes, out + d);
  }
}

}  // namespace
