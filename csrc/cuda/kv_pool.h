// The KV pool on the GPU: a block contains all layers consecutively, in the layout of KvLayer. A spare block
// after the caller's blocks receives the writes of padding rows (step graphs have fixed numbers of rows).
#pragma once

#include "core/backend.h"
#include "cuda/memory.h"
#include "cuda/ops.h"

namespace qvl::cuda {

class CudaKvPool final : public KvPool {
 public:
  CudaKvPool(const qvl_config& config, CUcontext context, CUstream own, int32_t n_blocks,
             int32_t block_tokens, qvl_dtype dtype);
  ~CudaKvPool() override;

  KvLayer layer(int index) const;
  int32_t spare_block() const { return n_blocks; }
  uint64_t number() const { return number_; }  // unique in the process

  void copy_block(int32_t from, int32_t to, qvl_stream stream) override;
  void read_block(int32_t block, void* host, qvl_stream stream) override;
  void write_block(int32_t block, const void* host, qvl_stream stream) override;
  uint64_t block_bytes() const override { return block_bytes_; }

 private:
  char* at(int32_t block) const { return memory_.get<char>() + static_cast<uint64_t>(block) * block_bytes_; }
  CUstream stream(qvl_stream given) const { return given != nullptr ? static_cast<CUstream>(given) : own_; }

  CUcontext context_;
  CUstream own_;
  int heads_, head_dim_;
  uint64_t block_bytes_, layer_bytes_, number_;
  DeviceMemory memory_;
};

}  // namespace qvl::cuda
