#include "cpu/kv_pool.h"

#include <cstring>

#include "core/error.h"

namespace qvl::cpu {
namespace {

size_t element_bytes(qvl_dtype dtype) {
  return dtype == QVL_FLOAT32 ? 4 : dtype == QVL_INT8 ? 1 : 2;
}

}  // namespace

CpuKvPool::CpuKvPool(const qvl_config& config, int32_t blocks, int32_t tokens, qvl_dtype type)
    : layers_(config.layers), heads_(config.heads), head_dim_(config.head_dim) {
  n_blocks = blocks;
  block_tokens = tokens;
  dtype = type;
  head_bytes_ = size(tokens) * size(head_dim_) * element_bytes(type);
  layer_bytes_ = 2 * size(heads_) * (head_bytes_ + (type == QVL_INT8 ? size(tokens) * sizeof(float) : 0));
  QVL_REQUIRE(block_bytes() <= PTRDIFF_MAX / size(blocks), QVL_NO_MEMORY, "out of memory");
  memory_ = buffer_.get<char>(block_bytes() * size(blocks));
}

KvTile CpuKvPool::tile(int layer, int block, int head, int n) const {
  char* memory = block_memory(layer, block);
  KvTile tile{memory + size(head) * head_bytes_, memory + size(heads_ + head) * head_bytes_, head_dim_, dtype,
              n};
  if (dtype == QVL_INT8) {
    tile.key_scales = scales(memory, 0, head);
    tile.value_scales = scales(memory, 1, head);
  }
  return tile;
}

void CpuKvPool::write(const Kernels& kernels, int layer, int block, int slot, int part, const float* from) {
  char* memory = block_memory(layer, block);
  for (int h = 0; h < heads_; ++h, from += head_dim_) {
    char* head = memory + size(part * heads_ + h) * head_bytes_;
    void* to = head + size(slot) * size(head_dim_) * element_bytes(dtype);
    switch (dtype) {
      case QVL_FLOAT32:
        std::memcpy(to, from, size(head_dim_) * sizeof(float));
        break;
      case QVL_BFLOAT16:
        kernels.narrow(from, static_cast<uint16_t*>(to), head_dim_);
        break;
      case QVL_FLOAT16:
        kernels.narrow_float16(from, static_cast<uint16_t*>(to), head_dim_);
        break;
      default:
        scales(memory, part, h)[slot] = kernels.narrow_int8(from, static_cast<int8_t*>(to), head_dim_);
    }
  }
}

void CpuKvPool::copy_block(int32_t from, int32_t to, qvl_stream) {
  if (from == to) return;
  for (int i = 0; i < layers_; ++i) std::memcpy(block_memory(i, to), block_memory(i, from), layer_bytes_);
}

void CpuKvPool::read_block(int32_t block, void* host, qvl_stream) {
  char* to = static_cast<char*>(host);
  for (int i = 0; i < layers_; ++i, to += layer_bytes_) std::memcpy(to, block_memory(i, block), layer_bytes_);
}

void CpuKvPool::write_block(int32_t block, const void* host, qvl_stream) {
  const char* from = static_cast<const char*>(host);
  for (int i = 0; i < layers_; ++i, from += layer_bytes_)
    std::memcpy(block_memory(i, block), from, layer_bytes_);
}

}  // namespace qvl::cpu
