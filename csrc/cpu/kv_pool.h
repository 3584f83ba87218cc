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

  void copy_block(int32_t from, int32_t to) override;
  void read_block(int32_t block, void* host) override;
  void write_block(int32_t block, const void* host) override;
  uint64_t block_bytes() const override { return static_cast<uint64_t>(layers_) * part_bytes_; }

  // Write the keys or values of one token, [heads][head_dim] at `from`.
  void write(const Kernels& kernels, int layer, int block, int slot, int part, const float* from);

 private:
  char* part(int layer, int block) const { return static_cast<char*>(head(layer, block, 0, 0)); }

  int heads_, head_dim_, layers_;
  size_t head_bytes_, part_bytes_;  // part: a block of a layer
  Buffer buffer_;
  char* memory_;
};

}  // namespace qvl::cpu
