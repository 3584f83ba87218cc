// Transfer of sampling parameters to the GPU and of sampled tokens to the caller.
#pragma once

#include <vector>

#include "core/backend.h"
#include "cuda/step_input.h"

namespace qvl::cuda {

// Properties of a batch that determine which sampling kernels run.
struct SampleKind {
  bool draws = false;    // some row is not greedy
  bool changes = false;  // some row has penalties or forbidden ids
  bool logprobs = false;
  int n_top = 0;
  int forbidden = 0;  // number of forbidden ids, rounded up
};

SampleKind sample_kind(const Picks& picks);

class Sampler {
 public:
  Sampler(const Gpu& gpu, const qvl_config& config);

  // Fill rows 0 .. picks.n - 1 of host.picks, and pad with greedy rows up to `rows`.
  void describe(const Picks& picks, int rows, const InputArrays& host);

  // Enqueue sampling of `rows` rows of logits; `at` describes them in device memory.
  void run(CUstream stream, const float* logits, int rows, const InputArrays& at, const SampleKind& kind);

  // Enqueue the copies of the first picks.n rows to the caller's outputs; waits if these are in pageable
  // memory.
  void give(CUstream stream, const Picks& picks);

  void reserve(int rows, const SampleKind& kind);
  int moved() const { return moved_; }

 private:
  void bring(CUstream stream, void* to, const void* from, uint64_t bytes, bool* waits);

  const Gpu& gpu_;
  const int vocab_;
  DeviceMemory scratch_, tokens_, logprobs_, top_tokens_, top_logprobs_;
  int moved_ = 0;
};

}  // namespace qvl::cuda
