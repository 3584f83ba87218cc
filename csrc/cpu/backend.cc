// The CPU back end.
#include <cstring>
#include <optional>

#include "core/backend.h"
#include "core/config.h"
#include "core/error.h"
#include "cpu/adapter.h"
#include "cpu/context.h"
#include "cpu/dispatch.h"
#include "cpu/kv_pool.h"
#include "cpu/language.h"
#include "cpu/sample.h"
#include "cpu/vision.h"

namespace qvl {
namespace {

// Event of a synchronous device: always done.
struct DoneEvent final : Event {
  void record(qvl_stream) override {}
  bool done() override { return true; }
  void wait() override {}
};

// Kernels for the config's ISA and compute type. Those of avx512_bf16 multiply prompts and images in
// bfloat16, so those of avx512 replace them for float32.
const cpu::Kernels& kernels(const qvl_config& config) {
  const cpu::Kernels& selected = cpu::kernels_for(config.isa);
  const bool bfloat16 = selected.isa == QVL_ISA_AVX512_BF16;
  switch (config.compute) {
    case QVL_COMPUTE_FLOAT32:
      return bfloat16 ? cpu::kernels_for(QVL_ISA_AVX512) : selected;
    case QVL_COMPUTE_BFLOAT16:
      QVL_REQUIRE(bfloat16, QVL_UNSUPPORTED,
                  "config: compute: bfloat16 products need the ISA avx512_bf16, and this engine uses %s; "
                  "choose another type",
                  cpu::isa_name(selected.isa));
      return selected;
    case QVL_COMPUTE_FLOAT16:
      fail(QVL_UNSUPPORTED, "config: compute: a CPU does not compute in float16; choose another type");
    default:
      return selected;
  }
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(const qvl_config& config, const WeightTable& table)
      : config_(config),
        context_(kernels(config), cpu::thread_count(config.n_threads),
                 /*exact=*/config.compute == QVL_COMPUTE_FLOAT32),
        sample_scratch_(static_cast<size_t>(context_.pool.size())) {
    cpu::Weights weights(table);
    if (has_language(config_)) language_.emplace(config_, weights);
    if (has_vision(config_)) vision_.emplace(config_, weights, context_);
    float_copies_ = weights.take_copies();
    snprintf(description_, sizeof description_, "cpu %s, %d thread%s", cpu::isa_name(context_.kernels.isa),
             context_.pool.size(), context_.pool.size() == 1 ? "" : "s");
  }

  const char* describe() const override { return description_; }
  bool runs_ahead() const override { return false; }
  void* alloc(uint64_t bytes) override { return cpu::allocate(bytes); }
  void dealloc(void* memory) override { std::free(memory); }
  void copy(void* to, const void* from, uint64_t bytes, qvl_stream) override {
    std::memmove(to, from, bytes);
  }
  void copy_async(void* to, const void* from, uint64_t bytes, qvl_stream stream) override {
    copy(to, from, bytes, stream);
  }
  void synchronize(qvl_stream) override {}
  void* alloc_host(uint64_t bytes) override { return alloc(bytes); }
  void dealloc_host(void* memory) override { dealloc(memory); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<DoneEvent>(); }

  std::unique_ptr<KvPool> make_pool(int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype) override {
    return std::make_unique<cpu::CpuKvPool>(config_, n_blocks, block_tokens, dtype);
  }

  std::unique_ptr<Adapter> make_adapter(const std::vector<AdapterMatrix>& matrices) override {
    return std::make_unique<cpu::CpuAdapter>(context_.kernels, config_.layers, matrices);
  }

  void encode_images(int64_t n, const float* images, float* features, qvl_stream) override {
    const int64_t image = int64_t{3} * config_.image_size * config_.image_size;
    const int64_t feature = int64_t{config_.n_queries} * config_.hidden;
    for (int64_t i = 0; i < n; ++i) vision_->encode(context_, images + i * image, features + i * feature);
  }

  void forward(KvPool& pool, const qvl_batch& batch, float* logits, qvl_stream) override {
    language_->forward(context_, static_cast<cpu::CpuKvPool&>(pool), batch, logits);
  }

  void sample(const float* logits, const SampleCall& call, qvl_stream) override {
    const auto counts_of = [&](int64_t i) { return call.counts != nullptr ? call.counts[i] : nullptr; };
    // If any row needs scratch memory, allocate that of all threads now: an allocation must not throw in a
    // thread of the pool.
    for (int32_t i = 0; i < call.n; ++i) {
      if (!cpu::needs_scratch(call.sampling[i], counts_of(i))) continue;
      for (cpu::Buffer& buffer : sample_scratch_) buffer.get<char>(cpu::sample_scratch_bytes(config_.vocab));
      break;
    }
    const bool logprobs = call.logprobs != nullptr || call.n_top > 0;
    context_.pool.run(call.n, [&](int64_t i, int thread) {
      const float* row = logits + i * config_.vocab;
      call.tokens[i] = cpu::sample_row(config_.vocab, row, call.sampling[i], counts_of(i),
                                       sample_scratch_[static_cast<size_t>(thread)]);
      if (!logprobs) return;
      cpu::row_logprobs(config_.vocab, row, call.tokens[i], call.logprobs ? call.logprobs + i : nullptr,
                        call.n_top, call.top_tokens + i * call.n_top, call.top_logprobs + i * call.n_top);
    });
  }

  void step(KvPool& pool, const qvl_batch& batch, float* logits, const SampleCall& call,
            qvl_stream stream) override {
    if (call.n == 0) return forward(pool, batch, nullptr, stream);
    if (logits == nullptr) logits = logits_.get<float>(cpu::size(int64_t{call.n} * config_.vocab));
    forward(pool, batch, logits, stream);
    sample(logits, call, stream);
  }

 private:
  const qvl_config config_;
  cpu::Context context_;
  std::vector<cpu::Buffer> sample_scratch_;  // one buffer per thread
  cpu::Buffer logits_;
  std::vector<std::unique_ptr<float[]>> float_copies_;  // of Weights::floats()
  std::optional<cpu::Language> language_;
  std::optional<cpu::Vision> vision_;
  char description_[64];
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const qvl_config& config, const WeightTable& weights) {
  return std::make_unique<CpuBackend>(config, weights);
}

}  // namespace qvl
