// Interface of a back end: the functions of the C interface, which qwenvl.h documents, for one kind of
// device. The callers in core/ have checked all arguments, except the token ids of a batch, which the back
// end checks or clamps.
#pragma once

#include <memory>
#include <vector>

#include "core/adapter.h"
#include "core/weights.h"
#include "qwenvl.h"

namespace qvl {

// Paged KV cache: keys and values of all layers in blocks of tokens.
struct KvPool {
  int32_t n_blocks;
  int32_t block_tokens;
  qvl_dtype dtype;

  virtual ~KvPool() = default;

  // Copy one block in all layers: to another block, to host memory, and from host memory. `host` has
  // block_bytes() bytes, the value of kv_block_bytes() (core/config.h).
  virtual void copy_block(int32_t from, int32_t to, qvl_stream stream) = 0;
  virtual void read_block(int32_t block, void* host, qvl_stream stream) = 0;
  virtual void write_block(int32_t block, const void* host, qvl_stream stream) = 0;
  virtual uint64_t block_bytes() const = 0;
};

// Event: a point in the work of a stream.
struct Event {
  virtual ~Event() = default;

  virtual void record(qvl_stream stream) = 0;
  virtual bool done() = 0;
  virtual void wait() = 0;
};

// Arguments of sample(): sampling parameters of n rows of logits, and where to write the results, as in
// qvl_step_args, whose n_logprobs is n_top here.
struct SampleCall {
  int32_t n;
  const qvl_sampling* sampling;
  int32_t* const* counts;
  int32_t* tokens;
  float* logprobs;
  int32_t n_top;
  int32_t* top_tokens;
  float* top_logprobs;
};

// The matrices of an adapter on the device.
struct Adapter {
  virtual ~Adapter() = default;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* describe() const = 0;

  // Whether calls return before their work is done, so that the host can enqueue steps in advance.
  virtual bool runs_ahead() const = 0;
  virtual void* alloc(uint64_t bytes) = 0;
  virtual void dealloc(void* memory) = 0;
  virtual void* alloc_host(uint64_t bytes) = 0;
  virtual void dealloc_host(void* memory) = 0;
  virtual void copy(void* to, const void* from, uint64_t bytes, qvl_stream stream) = 0;
  virtual void copy_async(void* to, const void* from, uint64_t bytes, qvl_stream stream) = 0;
  virtual void synchronize(qvl_stream stream) = 0;
  virtual std::unique_ptr<Event> make_event() = 0;

  virtual std::unique_ptr<KvPool> make_pool(int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype) = 0;
  virtual std::unique_ptr<Adapter> make_adapter(const std::vector<AdapterMatrix>& matrices) = 0;
  virtual void encode_images(int64_t n, const float* images, float* features, qvl_stream stream) = 0;
  virtual void forward(KvPool& pool, const qvl_batch& batch, float* logits, qvl_stream stream) = 0;
  virtual void sample(const float* logits, const SampleCall& call, qvl_stream stream) = 0;
  // forward(), then sample(). If `logits` is NULL, the logits are written to scratch memory.
  virtual void step(KvPool& pool, const qvl_batch& batch, float* logits, const SampleCall& call,
                    qvl_stream stream) = 0;
};

// The back end reads matrices where they are: the data of the tensors in `weights` must outlive it.
std::unique_ptr<Backend> make_cpu_backend(const qvl_config& config, const WeightTable& weights);

// Fill in the fields of a zeroed device info that apply to the CPU, except `size`.
void describe_cpu(qvl_device_info* info);

// Entry points of libqwenvl_cuda.so, exported as its symbol qvl_cuda_back_end. The functions throw Error.
struct CudaEntryPoints {
  const char* version;  // qvl_version() at build time
  int32_t (*count)();
  void (*describe)(int32_t index, qvl_device_info* info);
  std::unique_ptr<Backend> (*make)(const qvl_config& config, const WeightTable& weights);
};

// Load libqwenvl_cuda.so on the first call, from the folder of libqwenvl.so. If it cannot be loaded from
// there, use one that the process has already loaded or that is on the loader's search path. Throws
// QVL_UNSUPPORTED if there is none, if the loader refuses it, or if its version is not qvl_version().
const CudaEntryPoints& cuda_back_end();

}  // namespace qvl

// Handle of the C interface. Unlike the other handles (core/engine.h), back ends read it: it is in a batch.
struct qvl_adapter {
  const qvl_engine* engine;
  std::unique_ptr<qvl::Adapter> matrices;
};
