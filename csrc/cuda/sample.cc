// Launches of kernels/sample.cu, and the layout of its scratch memory.
#include "cuda/kernels/sample.h"

#include "cuda/ops.h"

namespace qvl::cuda {
namespace {

// Bump allocator of 16-byte aligned parts; with base NULL it only computes the size.
struct Parts {
  char* base;
  uint64_t used = 0;

  template <typename T>
  T* take(uint64_t count) {
    T* const part = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
    return part;
  }
};

uint64_t lay_out(SampleParams& params, int n, int vocab, void* scratch) {
  const auto rows = static_cast<uint64_t>(n);
  params.vocab = vocab;
  params.chunks = (vocab + kScanChunk - 1) / kScanChunk;
  params.mark_words = params.chunks * kScanChunk / 32;
  Parts parts{static_cast<char*>(scratch)};
  params.peaks = parts.take<ChunkPeak>(rows * static_cast<uint64_t>(params.chunks));
  params.states = parts.take<RowState>(rows);
  params.bin_weights = parts.take<unsigned long long>(rows * kSearchBins);
  params.bin_counts = parts.take<unsigned>(rows * kSearchBins);
  params.kept = parts.take<KeptIds>(rows);
  params.kept_keys = parts.take<unsigned long long>(rows * kKept);
  params.warp_mosts = parts.take<float>(rows * static_cast<uint64_t>(params.chunks) * kScanWarps);
  params.marks = parts.take<unsigned>(rows * static_cast<uint64_t>(params.mark_words));
  return parts.used;
}

}  // namespace

uint64_t sample_scratch(int n, int vocab) {
  SampleParams params{};
  return lay_out(params, n, vocab, nullptr);
}

void sample(const Gpu& gpu, CUstream stream, const float* logits, int n, int vocab, const Pick* picks,
            const int32_t* forbidden, bool any_draw, bool any_changed, void* scratch,
            const Sampled& sampled) {
  SampleParams params{};
  lay_out(params, n, vocab, scratch);
  params.logits = logits;
  params.picks = picks;
  params.forbidden = forbidden;
  params.any_draw = any_draw;
  params.any_changed = any_changed;
  params.want_floor = sampled.logprobs != nullptr || sampled.n_top > 0;
  params.weight_shift = 31;
  for (int64_t ids = 1; ids < vocab; ids *= 2) --params.weight_shift;
  params.tokens = sampled.tokens;
  params.logprobs = sampled.logprobs;
  params.n_top = sampled.n_top;
  params.top_tokens = sampled.top_tokens;
  params.top_logprobs = sampled.top_logprobs;

  // With few rows use more blocks per row; integer sums do not depend on the number of blocks.
  params.bin_vectors = n <= 8 ? 1 : kScanVectors;

  const auto rows = static_cast<unsigned>(n), chunks = static_cast<unsigned>(params.chunks);
  gpu.launch(stream, "sample_scan", {chunks, rows}, kScanThreads, 0, params, true);
  gpu.launch(stream, "sample_peak", {rows}, 32, 0, params, true);
  if (any_draw) {
    const int part = 4 * params.bin_vectors * kScanThreads;
    const Dim parts{static_cast<unsigned>((vocab + part - 1) / part), rows};
    gpu.launch(stream, "sample_bins", parts, kScanThreads, 0, params, true);
    gpu.launch(stream, "sample_keep", parts, kScanThreads, 0, params, true);
    gpu.launch(stream, "sample_draw", {rows}, kSearchThreads, 0, params, true);
  }
  if (sampled.n_top > 0) gpu.launch(stream, "sample_top", {rows}, kSearchThreads, 0, params, true);
}

}  // namespace qvl::cuda
