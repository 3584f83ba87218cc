// Attention of one query, scaled by the caller, over a KV cache, one head, from the textbook loops to the
// production kernel.
//
//   tile (block of the cache)  keys   [n][head_dim]  bfloat16   score[t]  = q . key[t]
//                              values [n][head_dim]  bfloat16   weight[t] = e^(score[t] - maximum) / sum
//   tile                       keys   ...                       out = sum over t of weight[t] * value[t]
//
// Cost: keys and values are read once, 4 * n_keys * head_dim bytes, for 4 * n_keys * head_dim FLOPs and
// n_keys exponentials: one FLOP per byte. The bound is memory bandwidth, as for matrix-vector products; with
// 2000 keys a decode step of the 7B model reads 32.8 MB of keys and values per layer, compared with 405 MB of
// bfloat16 weights.
#pragma once

#include "textbook/common.h"
#include "textbook/versions.h"

namespace {
namespace one_query {

using qvl::cpu::KvTile;
using qvl::textbook::Query;

// Call body(key, value) for each token in order.
template <typename Body>
QVL_INLINE void each_token(const Query& p, Body&& body) {
  for (const KvTile* tile = p.tiles; tile != p.tiles + p.n_tiles; ++tile) {
    for (int t = 0; t < tile->n; ++t) {
      body(static_cast<const BFloat16*>(tile->keys) + t * tile->stride,
           static_cast<const BFloat16*>(tile->values) + t * tile->stride);
    }
  }
}

QVL_INLINE float scalar_dot(const float* q, const BFloat16* key, int head_dim) {
  float dot = 0;
  for (int d = 0; d < head_dim; ++d) dot += q[d] * to_float(key[d].bits);
  return dot;
}

// Two passes with a buffer of scores. The first pass, over the keys, computes the scores and their maximum,
// which is subtracted so that e^score cannot overflow; the second pass adds the values. Bound by latency: the
// additions of a dot product depend on each other. The additions of a value's channels are independent, and
// the compiler vectorises that loop.
void v1(const Query& p) {
  float* scores = p.scratch;
  int n = 0;
  float maximum = -__builtin_inff(), total = 0;
  each_token(p, [&](const BFloat16* key, const BFloat16*) {
    scores[n] = scalar_dot(p.q, key, p.head_dim);
    maximum = scores[n] > maximum ? scores[n] : maximum;
    ++n;
  });
  for (int t = 0; t < n; ++t) {
    scores[t] = __builtin_expf(scores[t] - maximum);
    total += scores[t];
  }
  for (int d = 0; d < p.head_dim; ++d) p.out[d] = 0;
  n = 0;
  each_token(p, [&](const BFloat16*, const BFloat16* value) {
    const float weight = scores[n++] / total;
    for (int d = 0; d < p.head_dim; ++d) p.out[d] += weight * to_float(value[d].bits);
  });
}

// Online softmax (Milakov and Gimelshein, arXiv:1805.02867): one pass, no buffer. The running sums are
// relative to the running maximum; a larger score rescales them. Not faster yet, but now the keys can be
// processed in parts: from v4 on in groups, in cpu/attention.cc in chunks, which several threads can compute
// and whose results are merged.
void v2(const Query& p) {
  float maximum = -__builtin_inff(), total = 0;
  for (int d = 0; d < p.head_dim; ++d) p.out[d] = 0;
  each_token(p, [&](const BFloat16* key, const BFloat16* value) {
    const float score = scalar_dot(p.q, key, p.head_dim);
    if (score > maximum) {
      const float factor = __builtin_expf(maximum - score);
      maximum = score;
      total *= factor;
      for (int d = 0; d < p.head_dim; ++d) p.out[d] *= factor;
    }
    const float weight = __builtin_expf(score - maximum);
    total += weight;
    for (int d = 0; d < p.head_dim; ++d) p.out[d] += weight * to_float(value[d].bits);
  });
  for (int d = 0; d < p.head_dim; ++d) p.out[d] /= total;
}

// Divide the sums of values by the sum of weights.
QVL_INLINE void finish(const Query& p, const float* sums, float total) {
  each_vector(p.head_dim,
              [&](int d, int count) { store_first(p.out + d, load<Floats>(sums + d) * (1 / total), count); });
}

// If `score` exceeds the maximum, raise the maximum to it and rescale the sums of values. Return the factor
// of the rescaling.
QVL_INLINE float raise_maximum(const Query& p, float score, float& maximum, float* sums) {
  if (score <= maximum) return 1;
  const float factor = exp(broadcast(maximum - score))[0];
  maximum = score;
  each_vector(p.head_dim, [&](int d, int) { store(sums + d, load<Floats>(sums + d) * factor); });
  return factor;
}

// kLanes channels at a time. Still bound by latency: a dot product of 128 channels is a chain of 128 / kLanes
// additions and the addition of the lanes. The exponential computes kLanes equal values, of which one is
// used.
void v3(const Query& p) {
  float* sums = p.scratch;
  float maximum = -__builtin_inff(), total = 0;
  each_vector(p.head_dim, [&](int d, int) { store(sums + d, Floats{}); });
  each_token(p, [&](const BFloat16* key, const BFloat16* value) {
    Floats dot{};
    each_vector(p.head_dim, [&](int d, int count) {
      dot += load_elements(p.q + d, count) * load_elements(key + d, count);
    });
    const float score = sum(dot);
    total *= raise_maximum(p, score, maximum, sums);
    const float weight = exp(broadcast(score - maximum))[0];
    total += weight;
    each_vector(p.head_dim, [&](int d, int count) {
      store(sums + d, load<Floats>(sums + d) + load_elements(value + d, count) * weight);
    });
  });
  finish(p, sums, total);
}

// Prefetch the key or the value of a token, in lines of 64 bytes.
QVL_INLINE void prefetch_token(const BFloat16* token, int head_dim) {
  for (int d = 0; d < head_dim; d += 32) prefetch(token + d);
}

// v4 and v5: the keys of a tile in groups of up to kLanes. Prefetch: prefetch the values of a group while its
// scores are computed, and the keys of the next group while the values of this one are added.
template <bool Prefetch>
QVL_INLINE void key_groups(const Query& p) {
  float* sums = p.scratch;
  float maximum = -__builtin_inff();
  Floats total{};
  each_vector(p.head_dim, [&](int d, int) { store(sums + d, Floats{}); });
  for (const KvTile* tile = p.tiles; tile != p.tiles + p.n_tiles; ++tile) {
    for (int t = 0; t < tile->n; t += kLanes) {
      const int n = tile->n - t < kLanes ? tile->n - t : kLanes;
      const auto* keys = static_cast<const BFloat16*>(tile->keys) + t * tile->stride;
      const auto* values = static_cast<const BFloat16*>(tile->values) + t * tile->stride;
      // Keys to prefetch: the next group of this tile, or the first group of the next tile. In the last group
      // of the last tile the address is behind the tile; a prefetch of any address is harmless.
      const bool same_tile = t + kLanes < tile->n || tile + 1 == p.tiles + p.n_tiles;
      const auto* next_keys =
          same_tile ? keys + n * tile->stride : static_cast<const BFloat16*>(tile[1].keys);
      Floats dots[kLanes] = {};
      for (int i = 0; i < n; ++i) {
        if (Prefetch) prefetch_token(values + i * tile->stride, p.head_dim);
        Floats dot{};
        each_vector(p.head_dim, [&](int d, int count) {
          dot += load_elements(p.q + d, count) * load_elements(keys + i * tile->stride + d, count);
        });
        dots[i] = dot;
      }
      Floats scores = sums_of(dots);
      for (int i = n; i < kLanes; ++i) scores[i] = -__builtin_inff();
      total *= raise_maximum(p, largest(scores), maximum, sums);
      const Floats weights = exp(scores - maximum);
      total += weights;
      for (int i = 0; i < n; ++i) {
        if (Prefetch) prefetch_token(next_keys + i * tile->stride, p.head_dim);
        each_vector(p.head_dim, [&](int d, int count) {
          const Floats value = load_elements(values + i * tile->stride + d, count);
          store(sums + d, load<Floats>(sums + d) + value * weights[i]);
        });
      }
    }
  }
  finish(p, sums, sum(total));
}

// The scores of a group of kLanes keys, then their values: the lanes of the group's dot products are summed
// together (sums_of), and its keys share one exponential and one rescaling. Fewer instructions, but the
// stream of keys pauses while the group's values are read, and the hardware prefetcher restarts each time.
// Bound by memory latency.
void v4(const Query& p) {
  key_groups<false>(p);
}

// v4 with prefetches: of the values while the scores are computed, of the next keys while the values are
// added.
void v5(const Query& p) {
  key_groups<true>(p);
}

// The production kernel (cpu/kernels/attention.h), on up to 256 keys (kMaxKvTile) at a time. kLanes
// interleaved dot products share a vector of q; these up to 256 keys share one rescaling and one pass of
// exponentials; four vectors of sums stay in registers while the values of all these keys are added; the
// values of a tile and the keys of the next are prefetched while the tile's scores are computed.
void v6(const Query& p) {
  const qvl::cpu::Kernels& kernels = *qvl::cpu::QVL_KERNELS();
  float* sums = p.scratch;
  float state[2];
  kernels.attend_begin(1, round_up(p.head_dim, kLanes), state, sums);
  for (int first = 0, end = 0; first < p.n_tiles; first = end) {
    for (int keys = 0; end < p.n_tiles && keys + p.tiles[end].n <= qvl::cpu::kMaxKvTile; ++end) {
      keys += p.tiles[end].n;
    }
    kernels.attend_one(p.q, p.head_dim, p.tiles + first, end - first, state, sums);
  }
  kernels.attend_end(state, 1, round_up(p.head_dim, kLanes), sums);
  __builtin_memcpy(p.out, sums, static_cast<size_t>(p.head_dim) * sizeof(float));
}

}  // namespace one_query
}  // namespace
