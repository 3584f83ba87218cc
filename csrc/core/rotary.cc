#include "core/rotary.h"

#include <algorithm>
#include <cmath>

namespace qvl {

int ntk_doublings(const qvl_config& config, int prompt_len) {
  int doublings = 0;
  if (config.dynamic_ntk == 0) return doublings;
  for (int64_t length = config.seq_length; prompt_len > length; length *= 2) ++doublings;
  return doublings;
}

double ntk_alpha(const qvl_config& config, int prompt_len) {
  // ceil(log2(prompt_len / seq_length) + 1), if it is at least 1, is 1 + the number of doublings. Unlike the
  // logarithm, that number has no rounding error.
  return std::ldexp(1.0, ntk_doublings(config, prompt_len) + 1) - 1;
}

void rotary_frequencies(const qvl_config& config, int prompt_len, float* frequencies) {
  const int dim = config.head_dim;
  const double alpha = ntk_alpha(config, prompt_len);
  // With head_dim 2 the only frequency is 1, whatever the base.
  const double base =
      dim > 2 ? static_cast<double>(config.rotary_base) * std::pow(alpha, dim / (dim - 2.0)) : alpha;
  for (int i = 0; i < dim / 2; ++i) frequencies[i] = static_cast<float>(std::pow(base, -2.0 * i / dim));
}

void rotary_row(const qvl_config& config, const float* frequencies, int position, float* cos, float* sin) {
  for (int i = 0; i < config.head_dim / 2; ++i) {
    // Qwen's code rounds the angle to float32 before it takes the cosine.
    const float angle = static_cast<float>(position) * frequencies[i];
    cos[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
    sin[i] = static_cast<float>(std::sin(static_cast<double>(angle)));
  }
}

float query_scale(const qvl_config& config, int position) {
  double logn = 1;
  if (config.logn != 0)
    logn = std::max(1.0, std::log(position + 1.0) / std::log(static_cast<double>(config.seq_length)));
  return static_cast<float>(logn / std::sqrt(static_cast<double>(config.head_dim)));
}

}  // namespace qvl
