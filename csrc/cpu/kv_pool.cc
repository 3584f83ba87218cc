#include "cpu/kv_pool.h"

#include <cstring>

#include "core/error.h"

namespace qvl::cpu {

CpuKvPool::CpuKvPool(const qvl_config& config, int32_t blocks, int32_t tokens, qvl_dtype type)
    : heads_(config.heads), head_dim_(config.head_dim), layers_(config.layers) {
  QVL_REQUIRE(type == QVL_FLOAT32 || type == QVL_BFLOAT16, QVL_UNSUPPORTED,
              "pool: float16 and int8 are not built yet");
  n_blocks = blocks;
  block_tokens = tokens;
  dtype = type;
  head_bytes_ = static_cast<size_t>(tokens) * static_cast<size_t>(head_dim_) * (type == QVL_FLOAT32 ? 4 : 2);
  part_bytes_ = 2 * static_cast<size_t>(heads_) * head_bytes_;
  const size_t heads = 2 * static_cast<size_t>(config.layers) * static_cast<size_t>(heads_);
  QVL_REQUIRE(heads * head_bytes_ <= PTRDIFF_MAX / static_cast<size_t>(blocks), QVL_NO_MEMORY,
              "out of memory");
  memory_ = buffer_.get<char>(heads * head_bytes_ * static_cast<size_t>(blocks));
}

void CpuKvPool::copy_block(int32_t from, int32_t to) {
  for (int layer = 0; layer < layers_; ++layer) {
    std::memcpy(part(layer, to), part(layer, from), part_bytes_);
  }
}

void CpuKvPool::read_block(int32_t block, void* host) {
  auto* to = static_cast<char*>(host);
  for (int layer = 0; layer < layers_; ++layer, to += part_bytes_) {
    std::memcpy(to, part(layer, block), part_bytes_);
  }
}

void CpuKvPool::write_block(int32_t block, const void* host) {
  const auto* from = static_cast<const char*>(host);
  for (int layer = 0; layer < layers_; ++layer, from += part_bytes_) {
    std::memcpy(part(layer, block), from, part_bytes_);
  }
}

void CpuKvPool::write(const Kernels& kernels, int layer, int block, int slot, int part, const float* from) {
  for (int h = 0; h < heads_; ++h, from += head_dim_) {
    void* to = head(layer, block, part, h);
    const int64_t start = int64_t{slot} * head_dim_;
    if (dtype == QVL_FLOAT32) {
      std::memcpy(static_cast<float*>(to) + start, from, static_cast<size_t>(head_dim_) * sizeof(float));
    } else {
      kernels.narrow(from, static_cast<uint16_t*>(to) + start, head_dim_);
    }
  }
}

}  // namespace qvl::cpu
