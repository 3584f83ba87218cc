// Attention of one query over a KV cache, one head, from the textbook loops to the production kernel.
//
//   tile (block of the cache)  keys   [n][head_dim]  bfloat16   score[t]  = q . key[t]
//                              values [n][head_dim]  bfloat16   weight[t] = e^(score[t] - maximum) / sum
//   tile                       keys   ...                       out       = sum over t of weight[t] value[t]
//
// Cost: keys and values are read once, 4 n_keys head_dim bytes, for 4 n_keys head_dim FLOPs and n_keys
// exponentials: one FLOP per byte. The bound is memory bandwidth, as for the weights; with 2000 keys a decode
// step of the 7B model reads 32.8 MB of keys and values per layer, compared with 405 MB of bfloat16 weights.
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

// Two passes with a buffer of scores: over the keys for the scores and their maximum (without which e^score
// overflows), then over the values. Bound by latency: the additions of a dot product depend on each other.
// Those of the values do not, and the compiler vectorises that loop.
void v1(const Query& p) {
  float* scores = p.scratch;
  int n = 0;
  float most = -__builtin_inff(), total = 0;
  each_token(p, [&](const BFloat16* key, const BFloat16*) {
    scores[n] = scalar_dot(p.q, key, p.head_dim);
    most = scores[n] > most ? scores[n] : most;
    ++n;
  });
  for (int t = 0; t < n; ++t) {
    scores[t] = __builtin_expf(scores[t] - most);
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
// relative to the running maximum; a larger score rescales them. Not faster yet, but parts of the keys can
// now be computed separately and merged: in tiles here, by several threads in cpu/attention.cc.
void v2(const Query& p) {
  float most = -__builtin_inff(), total = 0;
  for (int d = 0; d < p.head_dim; ++d) p.out[d] = 0;
  each_token(p, [&](const BFloat16* key, const BFloat16* value) {
    const float score = scalar_dot(p.q, key, p.head_dim);
    if (score > most) {
      const float shrink = __builtin_expf(most - score);
      most = score;
      total *= shrink;
      for (int d = 0; d < p.head_dim; ++d) p.out[d] *= shrink;
    }
    const float weight = __builtin_expf(score - most);
    total += weight;
    for (int d = 0; d < p.head_dim; ++d) p.out[d] += weight * to_float(value[d].bits);
  });
  for (int d = 0; d < p.head_dim; ++d) p.out[d] /= total;
}

// Divide the sums of values by the sum of weights.
QVL_INLINE void finish(const Query& p, const float* sums, float total) {
  each_vector(p.head_dim,
              [&](int d, int some) { store_some(p.out + d, load<Floats>(sums + d) * (1 / total), some); });
}

// Raise the maximum to `score` if that is larger, and rescale the sums of values. Return the factor.
QVL_INLINE float raise_maximum(const Query& p, float score, float& most, float* sums) {
  if (score <= most) return 1;
  const float shrink = exp(all(most - score))[0];
  most = score;
  each_vector(p.head_dim, [&](int d, int) { store(sums + d, load<Floats>(sums + d) * shrink); });
  return shrink;
}

// kLanes channels at a time. Still bound by latency: a dot product of 128 channels is a chain of 128 / kLanes
// additions and a horizontal sum, and an exponential computes kLanes equal values to use one.
void v3(const Query& p) {
  float* sums = p.scratch;
  float most = -__builtin_inff(), total = 0;
  each_vector(p.head_dim, [&](int d, int) { store(sums + d, Floats{}); });
  each_token(p, [&](const BFloat16* key, const BFloat16* value) {
    Floats dot{};
    each_vector(p.head_dim, [&](int d, int some) { dot += some_of(p.q + d, some) * some_of(key + d, some); });
    const float score = sum(dot);
    total *= raise_maximum(p, score, most, sums);
    const float weight = exp(all(score - most))[0];
    total += weight;
    each_vector(p.head_dim, [&](int d, int some) {
      store(sums + d, load<Floats>(sums + d) + some_of(value + d, some) * weight);
    });
  });
  finish(p, sums, total);
}

// Prefetch the key or the value of a token, in lines of 64 bytes.
QVL_INLINE void prefetch_token(const BFloat16* token, int head_dim) {
  for (int d = 0; d < head_dim; d += 32) prefetch(token + d);
}

// v4 and v5: process a tile in groups of up to kLanes keys.
template <bool Prefetch>
QVL_INLINE void groups_of_keys(const Query& p) {
  float* sums = p.scratch;
  float most = -__builtin_inff();
  Floats total{};
  each_vector(p.head_dim, [&](int d, int) { store(sums + d, Floats{}); });
  for (const KvTile* tile = p.tiles; tile != p.tiles + p.n_tiles; ++tile) {
    for (int t = 0; t < tile->n; t += kLanes) {
      const int n = tile->n - t < kLanes ? tile->n - t : kLanes;
      const auto* keys = static_cast<const BFloat16*>(tile->keys) + t * tile->stride;
      const auto* values = static_cast<const BFloat16*>(tile->values) + t * tile->stride;
      const bool follow = t + kLanes < tile->n || tile + 1 == p.tiles + p.n_tiles;
      const auto* next = follow ? keys + n * tile->stride : static_cast<const BFloat16*>(tile[1].keys);
      Floats dots[kLanes] = {};
      for (int i = 0; i < n; ++i) {
        if (Prefetch) prefetch_token(values + i * tile->stride, p.head_dim);
        Floats dot{};
        each_vector(p.head_dim, [&](int d, int some) {
          dot += some_of(p.q + d, some) * some_of(keys + i * tile->stride + d, some);
        });
        dots[i] = dot;
      }
      Floats scores = sums_of(dots);
      for (int i = n; i < kLanes; ++i) scores[i] = -__builtin_inff();
      total *= raise_maximum(p, largest(scores), most, sums);
      const Floats weights = exp(scores - most);
      total += weights;
      for (int i = 0; i < n; ++i) {
        if (Prefetch) prefetch_token(next + i * tile->stride, p.head_dim);
        each_vector(p.head_dim, [&](int d, int some) {
          const Floats value = some_of(values + i * tile->stride + d, some);
          store(sums + d, load<Floats>(sums + d) + value * weights[i]);
        });
      }
    }
  }
  finish(p, sums, sum(total));
}

// kLanes keys, then their values: the lanes of all dot products are summed together (sums_of), with one
// exponential and one rescaling for all keys. Fewer instructions, but the reads alternate between keys and
// values, and the hardware prefetcher restarts each time. Bound by memory latency.
void v4(const Query& p) {
  groups_of_keys<false>(p);
}

// Prefetches values during the computation of their scores, and the next keys during the addition of values.
void v5(const Query& p) {
  groups_of_keys<true>(p);
}

// The production kernel (cpu/kernels/attention.h), on up to 256 keys at a time: kLanes interleaved dot
// products share a vector of q, one rescaling and one pass of exponentials serve all keys, four vectors of
// sums stay in registers over all values, and values and the next tile's keys are prefetched during the
// scores.
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
