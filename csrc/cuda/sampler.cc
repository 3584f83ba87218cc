#include "cuda/sampler.h"

#include <algorithm>

#include "core/sampling.h"

namespace qvl::cuda {
namespace {

const int32_t* counts_of(const Picks& picks, int i) {
  return picks.counts != nullptr ? picks.counts[i] : nullptr;
}

}  // namespace

SampleKind sample_kind(const Picks& picks) {
  SampleKind kind;
  kind.logprobs = picks.logprobs != nullptr || picks.n_top > 0;
  kind.n_top = picks.n_top;
  int forbidden = 0;
  for (int i = 0; i < picks.n; ++i) {
    const qvl_sampling& s = picks.sampling[i];
    kind.draws |= !greedy(s);
    kind.changes |= s.n_forbidden > 0 || counts_of(picks, i) != nullptr;
    forbidden += s.n_forbidden;
  }
  for (kind.forbidden = forbidden > 0 ? 16 : 0; kind.forbidden < forbidden;) kind.forbidden *= 2;
  return kind;
}

Sampler::Sampler(const Gpu& gpu, const qvl_config& config) : gpu_(gpu), vocab_(config.vocab) {}

void Sampler::describe(const Picks& picks, int rows, const InputArrays& host) {
  int forbidden = 0;
  for (int i = 0; i < rows; ++i) {
    Pick& to = host.picks[i];
    to = Pick{};
    to.repetition_penalty = 1;
    if (i >= picks.n) continue;
    const qvl_sampling& s = picks.sampling[i];
    to.temperature = greedy(s) ? 0 : s.temperature;
    to.top_p = s.top_p;
    to.top_k = s.top_k;
    to.repetition_penalty = s.repetition_penalty;
    to.frequency_penalty = s.frequency_penalty;
    to.presence_penalty = s.presence_penalty;
    to.n_forbidden = s.n_forbidden;
    to.first_forbidden = forbidden;
    std::copy_n(s.forbidden, s.n_forbidden, host.forbidden + forbidden);
    forbidden += s.n_forbidden;
    to.fraction = random_fraction(s.seed, s.counter);
    to.counts = const_cast<int32_t*>(counts_of(picks, i));
  }
}

void Sampler::reserve(int rows, const SampleKind& kind) {
  const auto grow = [&](DeviceMemory& memory, uint64_t bytes) {
    if (memory.bytes() >= bytes) return;
    memory = DeviceMemory();  // cuMemFree waits for the GPU
    memory = DeviceMemory(2 * bytes);
    ++moved_;
  };
  grow(scratch_, sample_scratch(rows, vocab_));
  grow(tokens_, size(rows) * 4);
  if (!kind.logprobs) return;
  grow(logprobs_, size(rows) * 4);
  grow(top_tokens_, size(rows) * size(std::max(kind.n_top, 1)) * 4);
  grow(top_logprobs_, size(rows) * size(std::max(kind.n_top, 1)) * 4);
}

void Sampler::run(CUstream stream, const float* logits, int rows, const InputArrays& at,
                  const SampleKind& kind) {
  const Sampled sampled{tokens_.get<int32_t>(), kind.logprobs ? logprobs_.get<float>() : nullptr, kind.n_top,
                        top_tokens_.get<int32_t>(), top_logprobs_.get<float>()};
  sample(gpu_, stream, logits, rows, vocab_, at.picks, at.forbidden, kind.draws, kind.changes, scratch_.get(),
         sampled);
}

void Sampler::bring(CUstream stream, void* to, const void* from, uint64_t bytes, bool* waits) {
  if (to == nullptr || bytes == 0) return;
  copy(stream, to, from, bytes);
  *waits |= !is_device_visible(to);
}

void Sampler::give(CUstream stream, const Picks& picks) {
  bool waits = false;
  const uint64_t rows = size(picks.n) * 4, top = rows * size(picks.n_top);
  bring(stream, picks.tokens, tokens_.get(), rows, &waits);
  bring(stream, picks.logprobs, logprobs_.get(), rows, &waits);
  bring(stream, picks.top_tokens, top_tokens_.get(), top, &waits);
  bring(stream, picks.top_logprobs, top_logprobs_.get(), top, &waits);
  if (waits) check(driver().cuStreamSynchronize(stream), "computing on the GPU");
}

}  // namespace qvl::cuda
