#include "cuda/kv_pool.h"

#include <atomic>

#include "core/config.h"
#include "core/error.h"
#include "cuda/gpu.h"

namespace qvl::cuda {

CudaKvPool::CudaKvPool(const qvl_config& config, CUcontext context, CUstream own, int32_t blocks,
                       int32_t tokens, qvl_dtype type)
    : context_(context), own_(own), heads_(config.heads), head_dim_(config.head_dim) {
  static std::atomic<uint64_t> made{0};
  n_blocks = blocks;
  block_tokens = tokens;
  dtype = type;
  block_bytes_ = kv_block_bytes(config, tokens, type);
  layer_bytes_ = block_bytes_ / static_cast<uint64_t>(config.layers);
  number_ = ++made;
  const Current current(context_);
  memory_ = DeviceMemory((static_cast<uint64_t>(blocks) + 1) * block_bytes_);
  // Padding rows read the spare block.
  check(driver().cuMemsetD8Async(address(at(blocks)), 0, block_bytes_, own_), "creating a KV pool");
}

CudaKvPool::~CudaKvPool() {
  const Current current(context_);
  memory_ = DeviceMemory();
}

KvLayer CudaKvPool::layer(int index) const {
  return {at(0) + static_cast<uint64_t>(index) * layer_bytes_,
          block_bytes_,
          block_tokens,
          dtype,
          heads_,
          head_dim_};
}

void CudaKvPool::copy_block(int32_t from, int32_t to, qvl_stream given) {
  const Current current(context_);
  copy(stream(given), at(to), at(from), block_bytes_);
}

void CudaKvPool::read_block(int32_t block, void* host, qvl_stream given) {
  const Current current(context_);
  copy(stream(given), host, at(block), block_bytes_);
  if (!is_device_visible(host)) check(driver().cuStreamSynchronize(stream(given)), "reading a block");
}

void CudaKvPool::write_block(int32_t block, const void* host, qvl_stream given) {
  const Current current(context_);
  copy(stream(given), at(block), host, block_bytes_);
  if (!is_device_visible(host)) check(driver().cuStreamSynchronize(stream(given)), "writing a block");
}

}  // namespace qvl::cuda
