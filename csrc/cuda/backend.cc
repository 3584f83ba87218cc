// The CUDA back end.
#include "core/backend.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>

#include "core/error.h"
#include "core/passes.h"
#include "cuda/image_encoder.h"
#include "cuda/step_graphs.h"

namespace qvl::cuda {
namespace {

constexpr unsigned kOwnStream = 1;  // non-blocking: not ordered with the default stream

// Event of the C interface; its functions make the context current.
class CudaEvent final : public Event {
 public:
  CudaEvent(CUcontext context, CUstream own) : context_(context), own_(own) {
    const Current current(context_);
    mark_.emplace();
  }
  ~CudaEvent() override {
    const Current current(context_);
    mark_.reset();
  }
  void record(qvl_stream stream) override {
    const Current current(context_);
    mark_->record(stream != nullptr ? static_cast<CUstream>(stream) : own_);
  }
  bool done() override {
    const Current current(context_);
    return mark_->done();
  }
  void wait() override {
    const Current current(context_);
    mark_->wait();
  }

 private:
  CUcontext context_;
  CUstream own_;
  std::optional<Mark> mark_;
};

bool bfloat16_here(int index) {
  CUdevice device = 0;
  int major = 0;
  return driver().cuDeviceGet(&device, index) == 0 &&
         driver().cuDeviceGetAttribute(&major, kComputeMajor, device) == 0 && major >= 8;
}

// Compute type: float16 for float16 weights and on GPUs without bfloat16, else bfloat16.
Half compute(const qvl_config& config, const WeightTable& weights) {
  switch (config.compute) {
    case QVL_COMPUTE_BFLOAT16:
      return Half::kBfloat16;
    case QVL_COMPUTE_FLOAT16:
      return Half::kFloat16;
    case QVL_COMPUTE_FLOAT32:
      fail(QVL_UNSUPPORTED, "config: compute: a GPU does not compute in float32; choose another type");
    default:
      break;
  }
  const bool language = (config.stages & QVL_STAGE_LANGUAGE) != 0;
  const qvl_dtype dtype = weights.at(language ? "wte.weight" : "visual.positional_embedding").dtype;
  return dtype == QVL_FLOAT16 || !bfloat16_here(config.device_index) ? Half::kFloat16 : Half::kBfloat16;
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(const qvl_config& config, const WeightTable& table)
      : config_(config), gpu_(config.device_index, compute(config, table)) {
    const Current current(gpu_.context());
    check(driver().cuStreamCreate(&own_, kOwnStream), "creating a stream");
    try {
      order_.emplace();
      Weights weights(gpu_, own_, table);
      if ((config.stages & QVL_STAGE_LANGUAGE) != 0) {
        language_.emplace(gpu_, config, weights);
        sampler_.emplace(gpu_, config);
        input_.emplace();
        graphs_.emplace(config, gpu_.context(), *language_, *sampler_, *input_);
      }
      if ((config.stages & QVL_STAGE_VISION) != 0) images_.emplace(gpu_, own_, config, weights);
      weights_ = weights.finish();
    } catch (...) {
      release();
      throw;
    }
    char name[100] = "";
    CUdevice device = 0;
    driver().cuDeviceGet(&device, config.device_index);
    driver().cuDeviceGetName(name, sizeof name, device);
    snprintf(description_, sizeof description_, "gpu %d, %s, %s", config.device_index, name,
             gpu_.half() == Half::kBfloat16 ? "bfloat16" : "float16");
  }

  ~CudaBackend() override {
    const Current current(gpu_.context());
    release();
  }

  const char* describe() const override { return description_; }
  bool runs_ahead() const override { return true; }

  void* alloc(uint64_t bytes) override {
    const Current current(gpu_.context());
    return allocate(std::max<uint64_t>(bytes, 1));
  }
  void dealloc(void* memory) override {
    const Current current(gpu_.context());
    driver().cuMemFree(address(memory));
  }
  void* alloc_host(uint64_t bytes) override {
    const Current current(gpu_.context());
    return allocate_host(std::max<uint64_t>(bytes, 1));
  }
  void dealloc_host(void* memory) override {
    const Current current(gpu_.context());
    driver().cuMemFreeHost(memory);
  }
  void copy(void* to, const void* from, uint64_t bytes, qvl_stream given) override {
    copy_async(to, from, bytes, given);
    synchronize(given);
  }
  void copy_async(void* to, const void* from, uint64_t bytes, qvl_stream given) override {
    const Current current(gpu_.context());
    cuda::copy(stream(given), to, from, bytes);
  }
  void synchronize(qvl_stream given) override {
    const Current current(gpu_.context());
    check(driver().cuStreamSynchronize(stream(given)), "computing on the GPU");
  }
  std::unique_ptr<Event> make_event() override { return std::make_unique<CudaEvent>(gpu_.context(), own_); }

  std::unique_ptr<KvPool> make_pool(int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype) override {
    return std::make_unique<CudaKvPool>(config_, gpu_.context(), own_, n_blocks, block_tokens, dtype);
  }

  std::unique_ptr<Adapter> make_adapter(const std::vector<AdapterMatrix>& matrices) override {
    const Current current(gpu_.context());
    return language_->make_adapter(own_, matrices);
  }

  void encode_images(int64_t n, const float* images, float* features, qvl_stream given) override {
    const Current current(gpu_.context());
    const CUstream at = computing_on(given);
    const int64_t image = int64_t{3} * config_.image_size * config_.image_size;
    const int64_t feature = int64_t{config_.n_queries} * config_.hidden;
    const bool in = is_device_visible(images), out = is_device_visible(features);
    for (int64_t i = 0; i < n; i += kImages) {
      const auto part = std::min<int64_t>(kImages, n - i);
      const auto image_bytes = static_cast<uint64_t>(part * image) * 4;
      const auto feature_bytes = static_cast<uint64_t>(part * feature) * 4;
      const float* from = images + i * image;
      float* to = features + i * feature;
      if (!in) {
        cuda::copy(at, grown(images_in_, image_bytes), from, image_bytes);
        from = images_in_.get<float>();
      }
      images_->encode(at, part, from, out ? to : grown(features_out_, feature_bytes));
      if (!out) cuda::copy(at, to, features_out_.get(), feature_bytes);
    }
    if (!out) check(driver().cuStreamSynchronize(at), "computing on the GPU");
  }

  void forward(KvPool& pool, const qvl_batch& batch, float* logits, qvl_stream given) override {
    const Current current(gpu_.context());
    check_host_ids(batch);
    const CUstream at = computing_on(given);
    const bool here = logits == nullptr || is_device_visible(logits);
    const uint64_t bytes = logits_bytes(batch);
    run(at, pool, batch, here ? logits : grown(logits_, bytes));
    if (here) return;
    cuda::copy(at, logits, logits_.get(), bytes);
    check(driver().cuStreamSynchronize(at), "computing on the GPU");
  }

  void sample(const float* logits, const Picks& picks, qvl_stream given) override {
    const Current current(gpu_.context());
    const CUstream at = computing_on(given);
    if (!is_device_visible(logits)) {
      const uint64_t bytes = row_bytes() * static_cast<uint64_t>(picks.n);
      cuda::copy(at, grown(logits_, bytes), logits, bytes);
      logits = logits_.get<float>();
    }
    pick(at, logits, picks);
  }

  void step(KvPool& pool, const qvl_batch& batch, float* logits, const Picks& picks,
            qvl_stream given) override {
    if (picks.n == 0) return forward(pool, batch, nullptr, given);
    const Current current(gpu_.context());
    check_host_ids(batch);
    const CUstream at = computing_on(given);
    if (logits == nullptr && StepGraphs::serves(batch, picks)) {
      graphs_->step(at, static_cast<CudaKvPool&>(pool), batch, picks);
      return;
    }
    const bool here = logits != nullptr && is_device_visible(logits);
    const uint64_t bytes = logits_bytes(batch);
    float* const made = here ? logits : grown(logits_, bytes);
    run(at, pool, batch, made);
    if (logits != nullptr && !here) cuda::copy(at, logits, made, bytes);
    pick(at, made, picks);
  }

 private:
  static constexpr int64_t kImages = 8;

  CUstream stream(qvl_stream given) const { return given != nullptr ? static_cast<CUstream>(given) : own_; }

  // Return the stream to compute on, ordered after earlier work on another stream with the same scratch
  // memory.
  CUstream computing_on(qvl_stream given) {
    const CUstream at = stream(given);
    if (last_ != nullptr && last_ != at) {
      order_->record(last_);
      order_->order(at);
    }
    last_ = at;
    return at;
  }

  uint64_t row_bytes() const { return static_cast<uint64_t>(config_.vocab) * sizeof(float); }

  uint64_t logits_bytes(const qvl_batch& batch) const {
    uint64_t rows = 0;
    for (int32_t i = 0; i < batch.n_sequences; ++i) {
      rows += (batch.sequences[i].flags & QVL_SEQUENCE_NO_LOGITS) == 0;
    }
    return rows * row_bytes();
  }

  static float* grown(DeviceMemory& memory, uint64_t bytes) {
    if (memory.bytes() < bytes) {
      memory = DeviceMemory();
      memory = DeviceMemory(bytes);
    }
    return memory.get<float>();
  }

  // Check ids in pageable host memory. The GPU may still be writing ids in other memory; the kernel clamps
  // them.
  void check_host_ids(const qvl_batch& batch) const {
    if (!is_device_visible(batch.tokens)) check_ids(batch, config_.vocab);
  }

  void run(CUstream at, KvPool& pool, const qvl_batch& batch, float* logits) {
    language_->forward(at, static_cast<CudaKvPool&>(pool), batch, logits, *input_);
  }

  void pick(CUstream at, const float* logits, Picks picks) {
    // Counts in pageable memory are copied to the GPU and back.
    const auto counted = static_cast<uint64_t>(config_.vocab) * sizeof(int32_t);
    std::vector<int32_t*> counts;
    uint64_t brought = 0;
    if (picks.counts != nullptr) {
      counts.assign(picks.counts, picks.counts + picks.n);
      for (int32_t* each : counts) brought += each != nullptr && !is_device_visible(each) ? counted : 0;
      char* to = reinterpret_cast<char*>(grown(counts_, brought));
      for (int32_t*& each : counts) {
        if (each == nullptr || is_device_visible(each)) continue;
        cuda::copy(at, to, each, counted);
        each = reinterpret_cast<int32_t*>(to);
        to += counted;
      }
    }
    int32_t* const* const given = picks.counts;
    if (given != nullptr) picks.counts = counts.data();
    const SampleKind kind = sample_kind(picks);
    InputSizes sizes;
    sizes.picks = picks.n;
    sizes.forbidden = kind.forbidden;
    sampler_->reserve(picks.n, kind);
    sampler_->describe(picks, picks.n, input_->begin(sizes));
    sampler_->run(at, logits, picks.n, input_->send(at), kind);
    for (size_t i = 0; brought > 0 && i < counts.size(); ++i) {
      if (counts[i] != given[i]) cuda::copy(at, given[i], counts[i], counted);
    }
    sampler_->give(at, picks);
    if (brought > 0) check(driver().cuStreamSynchronize(at), "computing on the GPU");
  }

  void release() {
    driver().cuStreamSynchronize(own_);
    graphs_.reset();
    images_.reset();
    language_.reset();
    sampler_.reset();
    input_.reset();
    order_.reset();
    weights_.clear();
    for (DeviceMemory* memory : {&logits_, &counts_, &images_in_, &features_out_}) *memory = DeviceMemory();
    driver().cuStreamDestroy(own_);
  }

  const qvl_config config_;
  Gpu gpu_;
  CUstream own_ = nullptr, last_ = nullptr;
  std::optional<Mark> order_;
  std::deque<DeviceMemory> weights_;
  std::optional<Language> language_;
  std::optional<ImageEncoder> images_;
  std::optional<Sampler> sampler_;
  std::optional<StepInput> input_;
  std::optional<StepGraphs> graphs_;
  DeviceMemory logits_, counts_, images_in_, features_out_;
  char description_[160];
};

int32_t count() {
  int n = 0;
  check(driver().cuDeviceGetCount(&n), "counting GPUs");
  return n;
}

void describe(int32_t index, qvl_device_info* info) {
  const Driver& d = driver();
  CUdevice device = 0;
  check(d.cuDeviceGet(&device, index), "finding the GPU");
  check(d.cuDeviceGetName(info->name, sizeof info->name, device), "querying the GPU's name");
  check(d.cuDeviceGetAttribute(&info->threads, kMultiprocessors, device), "querying multiprocessors");
  check(d.cuDeviceGetAttribute(&info->compute_major, kComputeMajor, device),
        "querying the compute capability");
  check(d.cuDeviceGetAttribute(&info->compute_minor, kComputeMinor, device),
        "querying the compute capability");
  CUcontext context = nullptr;
  check(d.cuDevicePrimaryCtxRetain(&context, device), "opening the GPU");
  size_t free = 0, total = 0;
  {
    const Current current(context);
    check(d.cuMemGetInfo(&free, &total), "querying free GPU memory");
  }
  d.cuDevicePrimaryCtxRelease(device);
  info->memory_bytes = total;
  info->free_bytes = free;
}

std::unique_ptr<Backend> make(const qvl_config& config, const WeightTable& weights) {
  return std::make_unique<CudaBackend>(config, weights);
}

}  // namespace
}  // namespace qvl::cuda

#define QVL_STRING_(x) #x
#define QVL_STRING(x) QVL_STRING_(x)

extern "C" QVL_API const qvl::CudaBackEnd qvl_cuda_back_end;
const qvl::CudaBackEnd qvl_cuda_back_end = {QVL_STRING(QVL_VERSION_MAJOR) "." QVL_STRING(QVL_VERSION_MINOR),
                                            qvl::cuda::count, qvl::cuda::describe, qvl::cuda::make};
