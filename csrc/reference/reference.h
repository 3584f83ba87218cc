// Reference implementations of the CPU kernels for the tests: plain loops in double precision, except for the
// angles of rotary(), which are float32 as in the engine.
#pragma once

#include <cstdint>

namespace qvl::reference {

// y [n_x][rows] = x [n_x][k] W^T + bias, or with `add` y += that; W [rows][k], bias may be NULL.
void linear(int64_t n_x, int64_t rows, int64_t k, const float* x, const float* weights, const float* bias,
            bool add, float* y);

// RMSNorm and LayerNorm of n rows [width].
void rms_norm(int64_t n, int64_t width, const float* x, const float* weight, double epsilon, float* y);

void layer_norm(int64_t n, int64_t width, const float* x, const float* weight, const float* bias,
                double epsilon, float* y);

// GELU, exact form, in place.
void gelu(int64_t n, float* x);

// x *= silu(gate)
void silu_mul(int64_t n, const float* gate, float* x);

// Rotate each row of x [n][head_dim] and multiply it by its scale. Pair i of a row, channels i and i +
// head_dim / 2, is rotated by the angle position * frequencies[i]. positions and scale [n], frequencies
// [head_dim / 2].
void rotary(int64_t n, int64_t head_dim, const int32_t* positions, const float* frequencies,
            const float* scale, float* x);

// Attention: q [n][heads][head_dim], k and v [n_keys][heads][head_dim] -> out, with the shape of q. With
// `causal` query i sees the first n_keys - n + i + 1 keys, else all. Scores are not scaled, since
// q already is.
void attention(int64_t heads, int64_t head_dim, int64_t n, int64_t n_keys, bool causal, const float* q,
               const float* k, const float* v, float* out);

}  // namespace qvl::reference
