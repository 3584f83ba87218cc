#include "cuda/sampler.h"

#include <algorithm>

#include "core/sampling.h"

namespace qvl::cuda {
namespace {

int32_t* counts_of(const SampleCall& call, int i) {
  return call.counts != nullptr ? call.counts[i] : nullptr;
}

}  // namespace

SampleKind sample_kind(const SampleCall& call) {
  SampleKind kind;
  kind.logprobs = call.logprobs != nullptr || call.n_top > 0;
  kind.n_top = call.n_top;
  int forbidden = 0;
  for (int i = 0; i < call.n; ++i) {
    const qvl_sampling& s = call.sampling[i];
    kind.draws |= !greedy(s);
    kind.changes |= s.n_forbidden > 0 || counts_of(call, i) != nullptr;
    forbidden += s.n_forbidden;
  }
  // Round up, so that batches with different numbers of forbidden ids share a captured graph.
  kind.forbidden = forbidden > 0 ? 16 : 0;
  while (kind.forbidden < forbidden) kind.forbidden *= 2;
  return kind;
}

Sampler::Sampler(const Gpu& gpu, const qvl_config& config) : gpu_(gpu), vocab_(config.vocab) {}

void Sampler::write_picks(const SampleCall& call, int rows, const InputArrays& host) {
  int forbidden = 0;
  for (int i = 0; i < rows; ++i) {
    Pick& pick = host.picks[i];
    pick = Pick{};
    pick.repetition_penalty = 1;
    if (i >= call.n) continue;
    const qvl_sampling& s = call.sampling[i];
    pick.temperature = greedy(s) ? 0 : s.temperature;
    pick.top_p = s.top_p;
    pick.top_k = s.top_k;
    pick.repetition_penalty = s.repetition_penalty;
    pick.frequency_penalty = s.frequency_penalty;
    pick.presence_penalty = s.presence_penalty;
    pick.n_forbidden = s.n_forbidden;
    pick.first_forbidden = forbidden;
    std::copy_n(s.forbidden, s.n_forbidden, host.forbidden + forbidden);
    forbidden += s.n_forbidden;
    pick.fraction = random_fraction(s.seed, s.counter);
    pick.counts = counts_of(call, i);
  }
}

void Sampler::reserve(int rows, const SampleKind& kind) {
  const auto grow = [&](DeviceMemory& memory, uint64_t bytes) {
    if (memory.bytes() >= bytes) return;
    memory = DeviceMemory();  // cuMemFree waits for the GPU
    // More than needed, because each growth makes the captured graphs stale.
    memory = DeviceMemory(2 * bytes);
    ++graph_version_;
  };
  grow(scratch_, sample_scratch(rows, vocab_));
  grow(tokens_, to_size(rows) * 4);
  if (!kind.logprobs) return;
  grow(logprobs_, to_size(rows) * 4);
  grow(top_tokens_, to_size(rows) * to_size(std::max(kind.n_top, 1)) * 4);
  grow(top_logprobs_, to_size(rows) * to_size(std::max(kind.n_top, 1)) * 4);
}

void Sampler::run(CUstream stream, const float* logits, int rows, const InputArrays& inputs,
                  const SampleKind& kind) {
  const SampleOutputs outputs{tokens_.get<int32_t>(), kind.logprobs ? logprobs_.get<float>() : nullptr,
                              kind.n_top, top_tokens_.get<int32_t>(), top_logprobs_.get<float>()};
  sample(gpu_, stream, logits, rows, vocab_, inputs.picks, inputs.forbidden, kind.draws, kind.changes,
         scratch_.get(), outputs);
}

void Sampler::copy_output(CUstream stream, void* to, const void* from, uint64_t bytes, bool* must_wait) {
  if (to == nullptr || bytes == 0) return;
  copy(stream, to, from, bytes);
  *must_wait |= !is_device_visible(to);
}

void Sampler::copy_outputs(CUstream stream, const SampleCall& call) {
  bool must_wait = false;
  const uint64_t bytes = to_size(call.n) * 4, top_bytes = bytes * to_size(call.n_top);
  copy_output(stream, call.tokens, tokens_.get(), bytes, &must_wait);
  copy_output(stream, call.logprobs, logprobs_.get(), bytes, &must_wait);
  copy_output(stream, call.top_tokens, top_tokens_.get(), top_bytes, &must_wait);
  copy_output(stream, call.top_logprobs, top_logprobs_.get(), top_bytes, &must_wait);
  if (must_wait) check(driver().cuStreamSynchronize(stream), "computing on the GPU");
}

}  // namespace qvl::cuda
