// The CPU as a back end.
#include <cstring>
#include <optional>

#include "core/backend.h"
#include "core/config.h"
#include "cpu/context.h"
#include "cpu/dispatch.h"
#include "cpu/kv_pool.h"
#include "cpu/language.h"
#include "cpu/sample.h"
#include "cpu/vision.h"

namespace qvl {
namespace {

class CpuBackend final : public Backend {
 public:
  CpuBackend(const qvl_config& config, const WeightTable& table)
      : config_(config),
        context_(cpu::kernels_for(config.isa), cpu::thread_count(config.n_threads)),
        sampling_(static_cast<size_t>(context_.pool.size())) {
    cpu::Weights weights(table);
    if (has_language(config_)) language_.emplace(config_, weights);
    if (has_vision(config_)) vision_.emplace(config_, weights, context_);
    copies_ = weights.take_copies();
    snprintf(description_, sizeof description_, "cpu %s, %d thread%s", cpu::isa_name(context_.kernels.isa),
             context_.pool.size(), context_.pool.size() == 1 ? "" : "s");
  }

  const char* describe() const override { return description_; }
  void* alloc(uint64_t bytes) override { return cpu::allocate(bytes); }
  void dealloc(void* memory) override { std::free(memory); }
  void copy(void* to, const void* from, uint64_t bytes, qvl_stream) override {
    std::memmove(to, from, bytes);
  }
  void synchronize(qvl_stream) override {}

  std::unique_ptr<KvPool> make_pool(int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype) override {
    return std::make_unique<cpu::CpuKvPool>(config_, n_blocks, block_tokens, dtype);
  }

  void encode_images(int64_t n, const float* images, float* features, qvl_stream) override {
    const int64_t image = int64_t{3} * config_.image_size * config_.image_size;
    const int64_t feature = int64_t{config_.n_queries} * config_.hidden;
    for (int64_t i = 0; i < n; ++i) vision_->encode(context_, images + i * image, features + i * feature);
  }

  void forward(KvPool& pool, const qvl_batch& batch, float* logits, qvl_stream) override {
    language_->forward(context_, static_cast<cpu::CpuKvPool&>(pool), batch, logits);
  }

  void sample(int32_t n, const float* logits, const qvl_sampling* sampling, int32_t* const* counts,
              int32_t* tokens, qvl_stream) override {
    for (cpu::Buffer& buffer : sampling_) buffer.get<char>(static_cast<size_t>(config_.vocab) * 16);
    context_.pool.run(n, [&](int64_t i, int thread) {
      tokens[i] =
          cpu::sample_row(config_.vocab, logits + i * config_.vocab, sampling[i],
                          counts != nullptr ? counts[i] : nullptr, sampling_[static_cast<size_t>(thread)]);
    });
  }

 private:
  const qvl_config config_;
  cpu::Context context_;
  std::vector<cpu::Buffer> sampling_;
  std::vector<std::unique_ptr<float[]>> copies_;
  std::optional<cpu::Language> language_;
  std::optional<cpu::Vision> vision_;
  char description_[64];
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const qvl_config& config, const WeightTable& weights) {
  return std::make_unique<CpuBackend>(config, weights);
}

}  // namespace qvl
