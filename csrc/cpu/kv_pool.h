// The KV pool on the CPU: memory [layers][blocks]. Each block has in each layer
// [2][heads][block_tokens][head_dim], keys before values; in an int8 pool float32 scales
// [2][heads][block_tokens] follow.
#pragma once

#include "core/backend.h"
#include "cpu/attention.h"
#include "cpu/memory.h"

namespace qvl::cpu {

class CpuKvPool final : public KvPool {
 public:
  CpuKvPool(const qvl_config& config, int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype);

  // The first n tokens of one head of a block.
  KvTile tile(int layer, int block, int head, int n) const;

  // Write the keys (part 0) or values (part 1), [heads][head_dim] at `from`, of token `slot` of a block.
  void write(const Kernels& kernels, int layer, int block, int slot, int part, const float* from);

  void copy_block(int32_t from, int32_t to, qvl_stream stream) override;
  void read_block(int32_t block, void* host, qvl_stream stream) override;
  void write_block(int32_t block, const void* host, qvl_stream stream) override;
  uint64_t block_bytes() const override { return size(layers_) * layer_bytes_; }

 private:
  // Memory of a layer of a block.
  char* block_memory(int layer, int block) const {
    return memory_ + size(int64_t{layer} * n_blocks + block) * layer_bytes_;
  }
  // Scales of the keys (part 0) or values (part 1) of a head; `memory`: from block_memory().
  float* scales(char* memory, int part, int head) const {
    return reinterpret_cast<float*>(memory + size(2 * heads_) * head_bytes_) +
           (int64_t{part} * heads_ + head) * block_tokens;
  }

  int layers_, heads_, head_dim_;
  size_t head_bytes_;   // keys or values of one head of a block, without scales
  size_t layer_bytes_;  // one layer of a block
  Buffer buffer_;
  char* memory_;
};

}  // namespace qvl::cpu
