// The KV pool on the GPU: a block contains all layers consecutively, each in the layout of KvLayer. After the
// caller's n_blocks blocks there is a spare block, which the padding rows of step graphs write and read.
#pragma once

#include "core/backend.h"
#include "cuda/memory.h"
#include "cuda/ops.h"

namespace qvl::cuda {

// engine_stream: the stream for calls whose `stream` is NULL.
class CudaKvPool final : public KvPool {
 public:
  CudaKvPool(const qvl_config& config, CUcontext context, CUstream engine_stream, int32_t n_blocks,
             int32_t block_tokens, qvl_dtype dtype);
  ~CudaKvPool() override;

  KvLayer layer(int index) const;
  int32_t spare_block() const { return n_blocks; }
  uint64_t id() const { return id_; }  // for step graphs: unique in the process, unlike the address

  void copy_block(int32_t from, int32_t to, qvl_stream stream) override;
  void read_block(int32_t block, void* host, qvl_stream stream) override;
  void write_block(int32_t block, const void* host, qvl_stream stream) override;
  uint64_t block_bytes() const override { return block_bytes_; }

 private:
  char* block_memory(int32_t block) const {
    return memory_.get<char>() + static_cast<uint64_t>(block) * block_bytes_;
  }
  CUstream stream(qvl_stream requested) const {
    return requested != nullptr ? static_cast<CUstream>(requested) : engine_stream_;
  }

  CUcontext context_;
  CUstream engine_stream_;
  int heads_, head_dim_;
  uint64_t block_bytes_, layer_bytes_, id_;
  DeviceMemory memory_;
};

}  // namespace qvl::cuda
