// What a device implements. Arguments have been checked when they arrive here.
#pragma once

#include <memory>

#include "core/weights.h"
#include "qwenvl.h"

namespace qvl {

// Keys and values of all layers in blocks of tokens.
struct KvPool {
  int32_t n_blocks;
  int32_t block_tokens;
  qvl_dtype dtype;

  virtual ~KvPool() = default;

  virtual void copy_block(int32_t from, int32_t to) = 0;
  virtual void read_block(int32_t block, void* host) = 0;
  virtual void write_block(int32_t block, const void* host) = 0;
  virtual uint64_t block_bytes() const = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* describe() const = 0;
  virtual void* alloc(uint64_t bytes) = 0;
  virtual void dealloc(void* memory) = 0;
  virtual void copy(void* to, const void* from, uint64_t bytes, qvl_stream stream) = 0;
  virtual void synchronize(qvl_stream stream) = 0;

  virtual std::unique_ptr<KvPool> make_pool(int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype) = 0;
  virtual void encode_images(int64_t n, const float* images, float* features, qvl_stream stream) = 0;
  virtual void forward(KvPool& pool, const qvl_batch& batch, float* logits, qvl_stream stream) = 0;
  virtual void sample(int32_t n, const float* logits, const qvl_sampling* sampling, int32_t* const* counts,
                      int32_t* tokens, qvl_stream stream) = 0;
};

std::unique_ptr<Backend> make_cpu_backend(const qvl_config& config, const WeightTable& weights);

}  // namespace qvl
