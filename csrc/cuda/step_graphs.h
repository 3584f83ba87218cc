// Decode steps as CUDA graphs: layers, lm_head and sampling for a fixed number of rows, captured on first use
// and replayed in later steps. The numbers of rows (with padding rows) and of keys are rounded up, so that
// similar steps share a graph.
#pragma once

#include <map>
#include <tuple>

#include "cuda/language.h"
#include "cuda/sampler.h"

namespace qvl::cuda {

class StepGraphs {
 public:
  StepGraphs(const qvl_config& config, CUcontext context, Language& language, Sampler& sampler,
             StepInput& input);
  ~StepGraphs();
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  // Whether the batch is a decode step of up to 256 sequences, with one new token per sequence, sampling for
  // all sequences, no image features, and any token counts (call.counts) in memory that the GPU can access.
  static bool can_run(const qvl_batch& batch, const SampleCall& call);

  // Run a batch for which can_run() is true.
  void step(CUstream stream, const CudaKvPool& pool, const qvl_batch& batch, const SampleCall& call);

 private:
  // Properties of a graph: id of the pool; rows; maximum number of keys per row; draws, changes, logprobs,
  // n_top and forbidden of SampleKind; whether a row has an adapter.
  using Key = std::tuple<uint64_t, int, int, bool, bool, bool, int, int, bool>;

  // The graph for these properties, captured if it does not exist.
  CUgraphExec graph_for(const CudaKvPool& pool, const InputSizes& sizes, const PassShape& shape,
                        const SampleKind& kind);
  // Destroy all graphs if they are stale (graph_version() of input_, language_ or sampler_ has changed, or
  // logits_ has moved), or if there are kMaxGraphs of them.
  void drop_stale_graphs();

  const qvl_config config_;
  const CUcontext context_;
  Language& language_;
  Sampler& sampler_;
  StepInput& input_;
  CUstream stream_ = nullptr;  // for capture only
  DeviceMemory logits_;
  std::map<Key, CUgraphExec> graphs_;
  // Sum of the graph_version() of input_, language_ and sampler_ when graphs_ were captured; -1: logits_ has
  // moved since.
  int graph_version_ = 0;
};

}  // namespace qvl::cuda
