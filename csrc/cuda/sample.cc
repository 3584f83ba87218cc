// Launches of kernels/sample.cu, and the layout of its scratch memory.
#include "cuda/kernels/sample.h"

#include "cuda/ops.h"

namespace qvl::cuda {
namespace {

// Bump allocator of 16-byte aligned arrays; with base NULL it only computes the size.
struct Layout {
  char* base;
  uint64_t used = 0;

  template <typename T>
  T* array_of(uint64_t count) {
    T* const array = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
    return array;
  }
};

// Set the sizes and the addresses of scratch memory in `params`; return the bytes of scratch memory.
uint64_t lay_out(SampleParams& params, int n, int vocab, void* scratch) {
  const auto rows = static_cast<uint64_t>(n);
  params.vocab = vocab;
  params.chunks = (vocab + kScanChunk - 1) / kScanChunk;
  params.mark_words = params.chunks * kScanChunk / 32;
  Layout layout{static_cast<char*>(scratch)};
  params.peaks = layout.array_of<ChunkPeak>(rows * static_cast<uint64_t>(params.chunks));
  params.states = layout.array_of<RowState>(rows);
  params.bin_weights = layout.array_of<unsigned long long>(rows * kSearchBins);
  params.bin_counts = layout.array_of<unsigned>(rows * kSearchBins);
  params.kept = layout.array_of<KeptIds>(rows);
  params.kept_keys = layout.array_of<unsigned long long>(rows * kMaxKept);
  params.warp_maxima = layout.array_of<float>(rows * static_cast<uint64_t>(params.chunks) * kScanWarps);
  params.marks = layout.array_of<unsigned>(rows * static_cast<uint64_t>(params.mark_words));
  return layout.used;
}

}  // namespace

uint64_t sample_scratch(int n, int vocab) {
  SampleParams params{};
  return lay_out(params, n, vocab, nullptr);
}

void sample(const Gpu& gpu, CUstream stream, const float* logits, int n, int vocab, const Pick* picks,
            const int32_t* forbidden, bool any_draw, bool any_changed, void* scratch,
            const SampleOutputs& outputs) {
  SampleParams params{};
  lay_out(params, n, vocab, scratch);
  params.logits = logits;
  params.picks = picks;
  params.forbidden = forbidden;
  params.any_draw = any_draw;
  params.any_changed = any_changed;
  params.want_log_sum = outputs.logprobs != nullptr || outputs.n_top > 0;
  // 31 minus the number of bits of an id: the weights of a row, each at most 2^(31 + weight_shift), then have
  // a sum below 2^63.
  params.weight_shift = 31;
  for (int64_t ids = 1; ids < vocab; ids *= 2) --params.weight_shift;
  params.tokens = outputs.tokens;
  params.logprobs = outputs.logprobs;
  params.n_top = outputs.n_top;
  params.top_tokens = outputs.top_tokens;
  params.top_logprobs = outputs.top_logprobs;

  // With few rows use more blocks per row. The number of blocks does not affect the results: sums are
  // integers.
  params.bin_vectors = n <= 8 ? 1 : kScanVectors;

  const auto rows = static_cast<unsigned>(n), chunks = static_cast<unsigned>(params.chunks);
  gpu.launch(stream, "sample_scan", {chunks, rows}, kScanThreads, 0, params, /*early=*/true);
  gpu.launch(stream, "sample_peak", {rows}, 32, 0, params, /*early=*/true);
  if (any_draw) {
    const int block_logits = 4 * params.bin_vectors * kScanThreads;
    const Dim grid{static_cast<unsigned>((vocab + block_logits - 1) / block_logits), rows};
    gpu.launch(stream, "sample_bins", grid, kScanThreads, 0, params, /*early=*/true);
    gpu.launch(stream, "sample_keep", grid, kScanThreads, 0, params, /*early=*/true);
    gpu.launch(stream, "sample_draw", {rows}, kSearchThreads, 0, params, /*early=*/true);
  }
  if (outputs.n_top > 0) gpu.launch(stream, "sample_top", {rows}, kSearchThreads, 0, params, /*early=*/true);
}

}  // namespace qvl::cuda
