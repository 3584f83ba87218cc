// The CUDA back end: implementation of Backend (core/backend.h), and the entry points of libqwenvl_cuda.so.
// Where qwenvl.h asks for device memory, pageable host memory works, too (docs/engine.md): inputs are copied
// to the GPU, and outputs back.
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

// Event of the C interface; unlike StreamEvent, its functions make the context current.
class CudaEvent final : public Event {
 public:
  CudaEvent(CUcontext context, CUstream engine_stream) : context_(context), engine_stream_(engine_stream) {
    const CurrentContext current(context_);
    event_.emplace();
  }
  ~CudaEvent() override {
    const CurrentContext current(context_);
    event_.reset();
  }
  void record(qvl_stream stream) override {
    const CurrentContext current(context_);
    event_->record(stream != nullptr ? static_cast<CUstream>(stream) : engine_stream_);
  }
  bool done() override {
    const CurrentContext current(context_);
    return event_->done();
  }
  void wait() override {
    const CurrentContext current(context_);
    event_->wait();
  }

 private:
  CUcontext context_;
  CUstream engine_stream_;
  std::optional<StreamEvent> event_;
};

// Whether GPU `index` computes in bfloat16.
bool has_bfloat16(int index) {
  CUdevice device = 0;
  int major = 0;
  return driver().cuDeviceGet(&device, index) == 0 &&
         driver().cuDeviceGetAttribute(&major, kComputeMajor, device) == 0 && major >= 8;
}

// Compute type: that of the config, with QVL_COMPUTE_BEST float16 for float16 weights and on GPUs without
// bfloat16, else bfloat16. The type of one tensor, the table of embeddings or of the vision tower's
// positions, stands for the weights.
Half compute_type(const qvl_config& config, const WeightTable& weights) {
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
  return dtype == QVL_FLOAT16 || !has_bfloat16(config.device_index) ? Half::kFloat16 : Half::kBfloat16;
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(const qvl_config& config, const WeightTable& table)
      : config_(config), gpu_(config.device_index, compute_type(config, table)) {
    const CurrentContext current(gpu_.context());
    check(driver().cuStreamCreate(&engine_stream_, kNonBlocking), "creating a stream");
    try {
      order_event_.emplace();
      Weights weights(gpu_, engine_stream_, table);
      if ((config.stages & QVL_STAGE_LANGUAGE) != 0) {
        language_.emplace(gpu_, config, weights);
        sampler_.emplace(gpu_, config);
        input_.emplace();
        graphs_.emplace(config, gpu_.context(), *language_, *sampler_, *input_);
      }
      if ((config.stages & QVL_STAGE_VISION) != 0) images_.emplace(gpu_, engine_stream_, config, weights);
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
    const CurrentContext current(gpu_.context());
    release();
  }

  const char* describe() const override { return description_; }
  bool runs_ahead() const override { return true; }

  void* alloc(uint64_t bytes) override {
    const CurrentContext current(gpu_.context());
    return allocate(std::max<uint64_t>(bytes, 1));  // cuMemAlloc refuses 0, which qwenvl.h allows
  }
  void dealloc(void* memory) override {
    const CurrentContext current(gpu_.context());
    driver().cuMemFree(address(memory));
  }
  void* alloc_host(uint64_t bytes) override {
    const CurrentContext current(gpu_.context());
    return allocate_host(std::max<uint64_t>(bytes, 1));
  }
  void dealloc_host(void* memory) override {
    const CurrentContext current(gpu_.context());
    driver().cuMemFreeHost(memory);
  }
  void copy(void* to, const void* from, uint64_t bytes, qvl_stream requested) override {
    copy_async(to, from, bytes, requested);
    synchronize(requested);
  }
  void copy_async(void* to, const void* from, uint64_t bytes, qvl_stream requested) override {
    const CurrentContext current(gpu_.context());
    cuda::copy(cuda_stream(requested), to, from, bytes);
  }
  void synchronize(qvl_stream requested) override {
    const CurrentContext current(gpu_.context());
    check(driver().cuStreamSynchronize(cuda_stream(requested)), "computing on the GPU");
  }
  std::unique_ptr<Event> make_event() override {
    return std::make_unique<CudaEvent>(gpu_.context(), engine_stream_);
  }

  std::unique_ptr<KvPool> make_pool(int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype) override {
    return std::make_unique<CudaKvPool>(config_, gpu_.context(), engine_stream_, n_blocks, block_tokens,
                                        dtype);
  }

  std::unique_ptr<Adapter> make_adapter(const std::vector<AdapterMatrix>& matrices) override {
    const CurrentContext current(gpu_.context());
    return language_->make_adapter(engine_stream_, matrices);
  }

  void encode_images(int64_t n, const float* images, float* features, qvl_stream requested) override {
    const CurrentContext current(gpu_.context());
    const CUstream stream = compute_stream(requested);
    const int64_t image_values = int64_t{3} * config_.image_size * config_.image_size;
    const int64_t feature_values = int64_t{config_.n_queries} * config_.hidden;
    const bool images_visible = is_device_visible(images), features_visible = is_device_visible(features);
    for (int64_t i = 0; i < n; i += kImageBatch) {
      const auto count = std::min<int64_t>(kImageBatch, n - i);
      const auto image_bytes = static_cast<uint64_t>(count * image_values) * 4;
      const auto feature_bytes = static_cast<uint64_t>(count * feature_values) * 4;
      const float* from = images + i * image_values;
      float* to = features + i * feature_values;
      if (!images_visible) {
        cuda::copy(stream, reserved(images_in_, image_bytes), from, image_bytes);
        from = images_in_.get<float>();
      }
      images_->encode(stream, count, from, features_visible ? to : reserved(features_out_, feature_bytes));
      if (!features_visible) cuda::copy(stream, to, features_out_.get(), feature_bytes);
    }
    if (!features_visible) check(driver().cuStreamSynchronize(stream), "computing on the GPU");
  }

  void forward(KvPool& pool, const qvl_batch& batch, float* logits, qvl_stream requested) override {
    const CurrentContext current(gpu_.context());
    check_host_ids(batch);
    const CUstream stream = compute_stream(requested);
    // direct: no copy is needed, since there are no logits or the kernels write to `logits`.
    const bool direct = logits == nullptr || is_device_visible(logits);
    const uint64_t bytes = logits_bytes(batch);
    run(stream, pool, batch, direct ? logits : reserved(logits_, bytes));
    if (direct) return;
    cuda::copy(stream, logits, logits_.get(), bytes);
    check(driver().cuStreamSynchronize(stream), "computing on the GPU");
  }

  void sample(const float* logits, const SampleCall& call, qvl_stream requested) override {
    const CurrentContext current(gpu_.context());
    const CUstream stream = compute_stream(requested);
    if (!is_device_visible(logits)) {
      const uint64_t bytes = row_bytes() * static_cast<uint64_t>(call.n);
      cuda::copy(stream, reserved(logits_, bytes), logits, bytes);
      logits = logits_.get<float>();
    }
    sample_rows(stream, logits, call);
  }

  void step(KvPool& pool, const qvl_batch& batch, float* logits, const SampleCall& call,
            qvl_stream requested) override {
    if (call.n == 0) return forward(pool, batch, nullptr, requested);
    const CurrentContext current(gpu_.context());
    check_host_ids(batch);
    const CUstream stream = compute_stream(requested);
    if (logits == nullptr && StepGraphs::can_run(batch, call)) {
      graphs_->step(stream, static_cast<CudaKvPool&>(pool), batch, call);
      return;
    }
    const bool direct = logits != nullptr && is_device_visible(logits);  // the kernels write to `logits`
    const uint64_t bytes = logits_bytes(batch);
    float* const device_logits = direct ? logits : reserved(logits_, bytes);
    run(stream, pool, batch, device_logits);
    if (logits != nullptr && !direct) cuda::copy(stream, logits, device_logits, bytes);
    sample_rows(stream, device_logits, call);
  }

 private:
  static constexpr int64_t kImageBatch = 8;  // images per copy: the batch size of ImageEncoder

  // The stream that the caller requests, or the engine's stream for NULL.
  CUstream cuda_stream(qvl_stream requested) const {
    return requested != nullptr ? static_cast<CUstream>(requested) : engine_stream_;
  }

  // cuda_stream() for computations. They share scratch memory, so if the previous computation used another
  // stream, this one waits for it.
  CUstream compute_stream(qvl_stream requested) {
    const CUstream stream = cuda_stream(requested);
    if (last_stream_ != nullptr && last_stream_ != stream) {
      order_event_->record(last_stream_);
      order_event_->hold(stream);
    }
    last_stream_ = stream;
    return stream;
  }

  uint64_t row_bytes() const { return static_cast<uint64_t>(config_.vocab) * sizeof(float); }

  uint64_t logits_bytes(const qvl_batch& batch) const {
    uint64_t rows = 0;
    for (int32_t i = 0; i < batch.n_sequences; ++i) {
      rows += (batch.sequences[i].flags & QVL_SEQUENCE_NO_LOGITS) == 0;
    }
    return rows * row_bytes();
  }

  // Enlarge `memory` if it is smaller than `bytes`, in which case its content is lost; return its address.
  static float* reserved(DeviceMemory& memory, uint64_t bytes) {
    if (memory.bytes() < bytes) {
      memory = DeviceMemory();
      memory = DeviceMemory(bytes);
    }
    return memory.get<float>();
  }

  // Check ids in pageable host memory. Ids in memory that the GPU can access are not checked, since the GPU
  // may not have written them yet; embed() clamps them to the vocabulary.
  void check_host_ids(const qvl_batch& batch) const {
    if (!is_device_visible(batch.tokens)) check_ids(batch, config_.vocab);
  }

  void run(CUstream stream, KvPool& pool, const qvl_batch& batch, float* logits) {
    language_->forward(stream, static_cast<CudaKvPool&>(pool), batch, logits, *input_);
  }

  void sample_rows(CUstream stream, const float* logits, SampleCall call) {
    // Token counts in pageable memory are copied to the GPU, where sampling increments them, and back.
    const auto count_bytes = static_cast<uint64_t>(config_.vocab) * sizeof(int32_t);  // of a row
    std::vector<int32_t*> counts;
    uint64_t copied_bytes = 0;
    if (call.counts != nullptr) {
      counts.assign(call.counts, call.counts + call.n);
      for (int32_t* count_row : counts)
        copied_bytes += count_row != nullptr && !is_device_visible(count_row) ? count_bytes : 0;
      char* to = reinterpret_cast<char*>(reserved(counts_, copied_bytes));
      for (int32_t*& count_row : counts) {
        if (count_row == nullptr || is_device_visible(count_row)) continue;
        cuda::copy(stream, to, count_row, count_bytes);
        count_row = reinterpret_cast<int32_t*>(to);
        to += count_bytes;
      }
    }
    int32_t* const* const callers_counts = call.counts;
    if (callers_counts != nullptr) call.counts = counts.data();
    const SampleKind kind = sample_kind(call);
    InputSizes sizes;
    sizes.picks = call.n;
    sizes.forbidden = kind.forbidden;
    sampler_->reserve(call.n, kind);
    sampler_->write_picks(call, call.n, input_->begin(sizes));
    sampler_->run(stream, logits, call.n, input_->send(stream), kind);
    for (size_t i = 0; copied_bytes > 0 && i < counts.size(); ++i) {
      if (counts[i] != callers_counts[i]) cuda::copy(stream, callers_counts[i], counts[i], count_bytes);
    }
    sampler_->copy_outputs(stream, call);
    if (copied_bytes > 0) check(driver().cuStreamSynchronize(stream), "computing on the GPU");
  }

  void release() {
    driver().cuStreamSynchronize(engine_stream_);
    graphs_.reset();
    images_.reset();
    language_.reset();
    sampler_.reset();
    input_.reset();
    order_event_.reset();
    weights_.clear();
    for (DeviceMemory* memory : {&logits_, &counts_, &images_in_, &features_out_}) *memory = DeviceMemory();
    driver().cuStreamDestroy(engine_stream_);
  }

  const qvl_config config_;
  Gpu gpu_;
  CUstream engine_stream_ = nullptr, last_stream_ = nullptr;
  std::optional<StreamEvent> order_event_;
  std::deque<DeviceMemory> weights_;
  std::optional<Language> language_;
  std::optional<ImageEncoder> images_;
  std::optional<Sampler> sampler_;
  std::optional<StepInput> input_;
  std::optional<StepGraphs> graphs_;
  DeviceMemory logits_, counts_, images_in_, features_out_;
  char description_[160];
};

// Number of GPUs.
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
    const CurrentContext current(context);
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

extern "C" QVL_API const qvl::CudaEntryPoints qvl_cuda_back_end;
const qvl::CudaEntryPoints qvl_cuda_back_end = {
    QVL_STRING(QVL_VERSION_MAJOR) "." QVL_STRING(QVL_VERSION_MINOR), qvl::cuda::count, qvl::cuda::describe,
    qvl::cuda::make};
