// Sampling of a batch: its parameters in the layout of the kernels, the kernels' launch, and copies of the
// outputs to the caller.
#pragma once

#include <vector>

#include "core/backend.h"
#include "cuda/step_input.h"

namespace qvl::cuda {

// Properties of a batch that determine which sampling kernels run, and the sizes of their inputs and outputs.
struct SampleKind {
  bool draws = false;     // at least one row is not greedy
  bool changes = false;   // at least one row has token counts (for penalties) or forbidden ids
  bool logprobs = false;  // log-probabilities of the sampled or of the most likely tokens are requested
  int n_top = 0;          // number of most likely tokens to return per row
  // Number of forbidden ids of all rows, rounded up to 0, 16, 32, 64 .., so that batches with similar numbers
  // share a captured graph.
  int forbidden = 0;
};

SampleKind sample_kind(const SampleCall& call);

class Sampler {
 public:
  Sampler(const Gpu& gpu, const qvl_config& config);

  // Write the sampling parameters to rows 0 to call.n - 1 of host.picks, and greedy ones to the rows up to
  // `rows`, which pad the batch of a captured graph; write the forbidden ids to host.forbidden.
  void write_picks(const SampleCall& call, int rows, const InputArrays& host);

  // Enqueue sampling of `rows` rows of logits; `inputs`, in device memory, has the parameters of the rows.
  void run(CUstream stream, const float* logits, int rows, const InputArrays& inputs, const SampleKind& kind);

  // Enqueue the copies of the outputs of the first call.n rows to the caller's memory. Waits for the copies
  // if that memory is pageable.
  void copy_outputs(CUstream stream, const SampleCall& call);

  // Reserve scratch memory and memory for outputs, before run(). A captured graph stays valid while
  // graph_version() is unchanged.
  void reserve(int rows, const SampleKind& kind);
  int graph_version() const { return graph_version_; }

 private:
  void copy_output(CUstream stream, void* to, const void* from, uint64_t bytes, bool* must_wait);

  const Gpu& gpu_;
  const int vocab_;
  DeviceMemory scratch_, tokens_, logprobs_, top_tokens_, top_logprobs_;
  int graph_version_ = 0;
};

}  // namespace qvl::cuda
