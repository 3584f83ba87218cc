#include "reference/reference.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace qvl::reference {
namespace {

double wide(float value) {
  return static_cast<double>(value);
}

}  // namespace

void linear(int64_t n_x, int64_t rows, int64_t k, const float* x, const float* weights, const float* bias,
            bool add, float* y) {
  for (int64_t i = 0; i < n_x; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      double sum = bias != nullptr ? wide(bias[r]) : 0;
      for (int64_t j = 0; j < k; ++j) sum += wide(x[i * k + j]) * wide(weights[r * k + j]);
      float& out = y[i * rows + r];
      out = static_cast<float>(add ? wide(out) + sum : sum);
    }
  }
}

void rms_norm(int64_t n, int64_t width, const float* x, const float* weight, double epsilon, float* y) {
  for (int64_t i = 0; i < n; ++i, x += width, y += width) {
    double squares = 0;
    for (int64_t j = 0; j < width; ++j) squares += wide(x[j]) * wide(x[j]);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + epsilon);
    for (int64_t j = 0; j < width; ++j) y[j] = static_cast<float>(wide(x[j]) * scale * wide(weight[j]));
  }
}

void layer_norm(int64_t n, int64_t width, const float* x, const float* weight, const float* bias,
                double epsilon, float* y) {
  for (int64_t i = 0; i < n; ++i, x += width, y += width) {
    double mean = 0, variance = 0;
    for (int64_t j = 0; j < width; ++j) mean += wide(x[j]) / static_cast<double>(width);
    for (int64_t j = 0; j < width; ++j)
      variance += std::pow(wide(x[j]) - mean, 2) / static_cast<double>(width);
    const double scale = 1 / std::sqrt(variance + epsilon);
    for (int64_t j = 0; j < width; ++j) {
      y[j] = static_cast<float>((wide(x[j]) - mean) * scale * wide(weight[j]) + wide(bias[j]));
    }
  }
}

void gelu(int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i)
    x[i] = static_cast<float>(wide(x[i]) * std::erfc(-wide(x[i]) / std::sqrt(2.0)) / 2);
}

void silu_mul(int64_t n, const float* gate, float* x) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = static_cast<float>(wide(x[i]) * wide(gate[i]) / (1 + std::exp(-wide(gate[i]))));
  }
}

void rotary(int64_t n, int64_t head_dim, const int32_t* positions, const float* frequencies,
            const float* scale, float* x) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < n; ++i, x += head_dim) {
    for (int64_t j = 0; j < half; ++j) {
      const double angle = wide(static_cast<float>(positions[i]) * frequencies[j]);
      const double a = wide(x[j]), b = wide(x[j + half]);
      x[j] = static_cast<float>((a * std::cos(angle) - b * std::sin(angle)) * wide(scale[i]));
      x[j + half] = static_cast<float>((b * std::cos(angle) + a * std::sin(angle)) * wide(scale[i]));
    }
  }
}

void attention(int64_t heads, int64_t head_dim, int64_t n, int64_t n_keys, bool causal, const float* q,
               const float* k, const float* v, float* out) {
  const int64_t stride = heads * head_dim;
  std::vector<double> weights(static_cast<size_t>(n_keys));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t seen = causal ? n_keys - n + i + 1 : n_keys;
    for (int64_t h = 0; h < heads; ++h) {
      double most = -INFINITY, total = 0;
      for (int64_t t = 0; t < seen; ++t) {
        double score = 0;
        for (int64_t d = 0; d < head_dim; ++d) {
          score += wide(q[i * stride + h * head_dim + d]) * wide(k[t * stride + h * head_dim + d]);
        }
        weights[static_cast<size_t>(t)] = score;
        most = std::max(most, score);
      }
      for (int64_t t = 0; t < seen; ++t)
        total += weights[static_cast<size_t>(t)] = std::exp(weights[static_cast<size_t>(t)] - most);
      for (int64_t d = 0; d < head_dim; ++d) {
        double sum = 0;
        for (int64_t t = 0; t < seen; ++t) {
          sum += weights[static_cast<size_t>(t)] * wide(v[t * stride + h * head_dim + d]);
        }
        out[i * stride + h * head_dim + d] = static_cast<float>(sum / total);
      }
    }
  }
}

}  // namespace qvl::reference
