// Keys and values in blocks of tokens: for each layer [n_blocks][2][heads][block_tokens][head_dim].
#pragma once

#include "core/backend.h"
#include "cpu/attention.h"
#include "cpu/memory.h"

namespace qvl::cpu {

class CpuKvPool final : public KvPool {
 public:
  CpuKvPool(const qvl_config& config, int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype);

  // Keys (part 0) or values (part 1) of a block's head: [block_tokens][head_dim].
  void* head(int layer, int block, int part, int head_index) const {
    const int64_t index = ((int64_t{layer} * n_blocks + block) * 2 + part) * heads_ + head_index;
    return memory_ + static_cast<size_t>(index) * head_bytes_;
  }

  // Write the keys or values of one token, [heads][head_dim] at `from`.
  void write(const Kernels& kernels, int layer, int block, int slot, int part, const float* from);

 private:
  int heads_, head_dim_;
  size_t head_bytes_;
  Buffer buffer_;
  char* memory_;
};

}  // namespace qvl::cpu
