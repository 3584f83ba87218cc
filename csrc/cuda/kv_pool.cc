#include "cuda/kv_pool.h"

#include <atomic>

#include "core/config.h"
#include "core/error.h"
#include "cuda/gpu.h"

namespace qvl::cuda {

CudaKvPool::CudaKvPool(const qvl_config& config, CUcontext context, CUstream engine_stream, int32_t blocks,
                       int32_t tokens, qvl_dtype type)
    : context_(context), engine_stream_(engine_stream), heads_(config.heads), head_dim_(config.head_dim) {
  static std::atomic<uint64_t> created{0};
  n_blocks = blocks;
  block_tokens = tokens;
  dtype = type;
  block_bytes_ = kv_block_bytes(config, tokens, type);
  layer_bytes_ = block_bytes_ / static_cast<uint64_t>(config.layers);
  id_ = ++created;
  const CurrentContext current(context_);
  memory_ = DeviceMemory((static_cast<uint64_t>(blocks) + 1) * block_bytes_);
  // Clear the spare block, since padding rows read it: uninitialised memory may contain NaNs.
  check(driver().cuMemsetD8Async(address(block_memory(blocks)), 0, block_bytes_, engine_stream_),
        "creating a KV pool");
}

CudaKvPool::~CudaKvPool() {
  const CurrentContext current(context_);
  memory_ = DeviceMemory();
}

KvLayer CudaKvPool::layer(int index) const {
  return {block_memory(0) + static_cast<uint64_t>(index) * layer_bytes_,
          block_bytes_,
          block_tokens,
          dtype,
          heads_,
          head_dim_};
}

void CudaKvPool::copy_block(int32_t from, int32_t to, qvl_stream requested) {
  const CurrentContext current(context_);
  copy(stream(requested), block_memory(to), block_memory(from), block_bytes_);
}

void CudaKvPool::read_block(int32_t block, void* host, qvl_stream requested) {
  const CurrentContext current(context_);
  copy(stream(requested), host, block_memory(block), block_bytes_);
  if (!is_device_visible(host)) check(driver().cuStreamSynchronize(stream(requested)), "reading a block");
}

void CudaKvPool::write_block(int32_t block, const void* host, qvl_stream requested) {
  const CurrentContext current(context_);
  copy(stream(requested), block_memory(block), host, block_bytes_);
  if (!is_device_visible(host)) check(driver().cuStreamSynchronize(stream(requested)), "writing a block");
}

}  // namespace qvl::cuda
