// Decode steps as CUDA graphs: layers, lm_head and sampling for a number of rows, captured once and replayed.
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

  // Whether the step has one decode token for each of up to 256 sequences, all sampled.
  static bool serves(const qvl_batch& batch, const Picks& picks);

  void step(CUstream stream, const CudaKvPool& pool, const qvl_batch& batch, const Picks& picks);

 private:
  // Properties fixed at capture: pool, rows, keys, draws, changes, logprobs, n_top, forbidden, adapted.
  using Key = std::tuple<uint64_t, int, int, bool, bool, bool, int, int, bool>;

  CUgraphExec captured(const CudaKvPool& pool, const InputSizes& sizes, const PassShape& shape,
                       const SampleKind& kind);
  void forget_moved();

  const qvl_config config_;
  const CUcontext context_;
  Language& language_;
  Sampler& sampler_;
  StepInput& input_;
  CUstream stream_ = nullptr;  // for capture only
  DeviceMemory logits_;
  std::map<Key, CUgraphExec> graphs_;
  int moved_ = 0;
};

}  // namespace qvl::cuda
