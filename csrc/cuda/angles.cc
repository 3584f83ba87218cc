#include "cuda/angles.h"

#include <vector>

#include "core/rotary.h"

namespace qvl::cuda {
namespace {

DeviceMemory uploaded(Uploader& uploader, const std::vector<float>& values) {
  const uint64_t bytes = values.size() * sizeof(float);
  DeviceMemory memory(bytes);
  uploader.copy(memory.get(), values.data(), bytes);
  return memory;
}

}  // namespace

AngleTables::AngleTables(const qvl_config& config, Uploader& uploader) : config_(config) {
  const auto half_dim = static_cast<size_t>(config.head_dim / 2),
             rows = static_cast<size_t>(config.max_positions);
  const auto tables = static_cast<size_t>(ntk_doublings(config, config.max_positions)) + 1;
  std::vector<float> cos(tables * rows * half_dim), sin(cos.size()), query_scales(rows),
      frequencies(half_dim);
  int64_t prompt_len = config.seq_length;  // the longest prompt of table t
  for (size_t t = 0; t < tables; ++t, prompt_len *= 2) {
    rotary_frequencies(config, static_cast<int>(prompt_len), frequencies.data());
    for (size_t i = 0; i < rows; ++i) {
      const size_t offset = (t * rows + i) * half_dim;
      rotary_row(config, frequencies.data(), static_cast<int>(i), &cos[offset], &sin[offset]);
    }
  }
  for (size_t i = 0; i < rows; ++i) query_scales[i] = query_scale(config, static_cast<int>(i));
  cos_ = uploaded(uploader, cos);
  sin_ = uploaded(uploader, sin);
  scale_ = uploaded(uploader, query_scales);
  angles_ = {cos_.get<float>(), sin_.get<float>(), scale_.get<float>(), config.max_positions};
}

int AngleTables::table(int32_t prompt_len) const {
  return ntk_doublings(config_, prompt_len);
}

}  // namespace qvl::cuda
