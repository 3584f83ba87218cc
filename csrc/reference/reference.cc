#include "reference/reference.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace qvl::reference {
namespace {

double to_double(float value) {
  return static_cast<double>(value);
}

}  // namespace

void linear(int64_t n_x, int64_t rows, int64_t k, const float* x, const float* weights, const float* bias,
            bool add, float* y) {
  for (int64_t i = 0; i < n_x; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      double sum = bias != nullptr ? to_double(bias[r]) : 0;
      for (int64_t j = 0; j < k; ++j) sum += to_double(x[i * k + j]) * to_double(weights[r * k + j]);
      float& out = y[i * rows + r];
      out = static_cast<float>(add ? to_double(out) + sum : sum);
    }
  }
}

void rms_norm(int64_t n, int64_t width, const float* x, const float* weight, double epsilon, float* y) {
  for (int64_t i = 0; i < n; ++i, x += width, y += width) {
    double squares = 0;
    for (int64_t j = 0; j < width; ++j) squares += to_double(x[j]) * to_double(x[j]);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + epsilon);
    for (int64_t j = 0; j < width; ++j)
      y[j] = static_cast<float>(to_double(x[j]) * scale * to_double(weight[j]));
  }
}

void layer_norm(int64_t n, int64_t width, const float* x, const float* weight, const float* bias,
                double epsilon, float* y) {
  for (int64_t i = 0; i < n; ++i, x += width, y += width) {
    double mean = 0, variance = 0;
    for (int64_t j = 0; j < width; ++j) mean += to_double(x[j]) / static_cast<double>(width);
    for (int64_t j = 0; j < width; ++j)
      variance += std::pow(to_double(x[j]) - mean, 2) / static_cast<double>(width);
    const double scale = 1 / std::sqrt(variance + epsilon);
    for (int64_t j = 0; j < width; ++j) {
      y[j] = static_cast<float>((to_double(x[j]) - mean) * scale * to_double(weight[j]) + to_double(bias[j]));
    }
  }
}

void gelu(int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i)
    x[i] = static_cast<float>(to_double(x[i]) * std::erfc(-to_double(x[i]) / std::sqrt(2.0)) / 2);
}

void silu_mul(int64_t n, const float* gate, float* x) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = static_cast<float>(to_double(x[i]) * to_double(gate[i]) / (1 + std::exp(-to_double(gate[i]))));
  }
}

void rotary(int64_t n, int64_t head_dim, const int32_t* positions, const float* frequencies,
            const float* scale, float* x) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < n; ++i, x += head_dim) {
    for (int64_t j = 0; j < half; ++j) {
      // Of the intermediate values only the angle is rounded to float32, as in the official code and in
      // core/rotary.cc.
      const double angle = to_double(static_cast<float>(positions[i]) * frequencies[j]);
      const double a = to_double(x[j]), b = to_double(x[j + half]);
      x[j] = static_cast<float>((a * std::cos(angle) - b * std::sin(angle)) * to_double(scale[i]));
      x[j + half] = static_cast<float>((b * std::cos(angle) + a * std::sin(angle)) * to_double(scale[i]));
    }
  }
}

void attention(int64_t heads, int64_t head_dim, int64_t n, int64_t n_keys, bool causal, const float* q,
               const float* k, const float* v, float* out) {
  const int64_t stride = heads * head_dim;
  std::vector<double> weights(static_cast<size_t>(n_keys));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t n_visible = causal ? n_keys - n + i + 1 : n_keys;
    for (int64_t h = 0; h < heads; ++h) {
      double maximum = -INFINITY, total = 0;
      for (int64_t t = 0; t < n_visible; ++t) {
        double score = 0;
        for (int64_t d = 0; d < head_dim; ++d) {
          score += to_double(q[i * stride + h * head_dim + d]) * to_double(k[t * stride + h * head_dim + d]);
        }
        weights[static_cast<size_t>(t)] = score;
        maximum = std::max(maximum, score);
      }
      for (int64_t t = 0; t < n_visible; ++t) {
        double& weight = weights[static_cast<size_t>(t)];
        weight = std::exp(weight - maximum);
        total += weight;
      }
      for (int64_t d = 0; d < head_dim; ++d) {
        double sum = 0;
        for (int64_t t = 0; t < n_visible; ++t) {
          sum += weights[static_cast<size_t>(t)] * to_double(v[t * stride + h * head_dim + d]);
        }
        out[i * stride + h * head_dim + d] = static_cast<float>(sum / total);
      }
    }
  }
}

}  // namespace qvl::reference
