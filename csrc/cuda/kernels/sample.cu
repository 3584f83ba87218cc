// Sampling of tokens from rows of logits, float32 [n, vocab].
//
// Layout. Up to six kernels, of one launch each:
//
//   sample_scan    a block per 4096 logits: most likely id, checks,           -> peaks [n][chunks]
//                  partial sum of the softmax, bits of forbidden ids
//   sample_peak    a warp per row merges its peaks; finishes greedy and       -> states [n]
//                  invalid rows
//   sample_bins    rows that draw: weights and counts of 2048 bins,           -> bins [n][2048]
//                  several blocks per row
//   sample_keep    rows that draw: the ids of the bins that sample_draw needs -> kept_keys [n][2048]
//   sample_draw    rows that draw: top-k, top-p, the draw, a block per row    -> tokens [n]
//   sample_top     most likely tokens and their log probabilities, if         -> top_tokens [n][n_top]
//                  requested, a block per row
//
// Greedy picks and draws use the logits after penalties and forbidden ids (struct Row); log probabilities and
// the most likely tokens of sample_top use the unchanged logits.
//
// A draw needs the most likely ids in order, and sums in that order, but not all 151,936 ids. The key of an
// id is its distance, (largest logit - logit) / temperature, in steps of 2^-35, followed by the id; ids at a
// distance of 32 or more have weight 0. Weights exp(-distance) are stored as integers, in a small unit, so
// that sums do not depend on the order of additions, and atomic additions give the same bits for any
// distribution of the row over blocks.
//
// Top-k, top-p and the draw each search for the id at which a running sum, for top-k the number of ids, else
// their weight, exceeds a value. The bins of sample_bins, by the first 11 bits of the key, show the bin of
// that id. Its ids, and all ids before it if another search follows, are then sorted. If they are at most
// 2048, sample_keep gathers them, and sample_draw does not read the row. Otherwise, in flat rows, sample_draw
// fills bins of the next 11 bits, and reads the row a few times.
//
// Cost. Greedy, one row of 151,936: 608 KB from the L2 cache, where the preceding product left them, by 38
// blocks with 64 bytes in flight per thread, then 38 ChunkPeaks: little more than two launches. 256 rows
// have 156 MB: 36 us at memory bandwidth (4 * n * vocab bytes). Measured on an H200: greedy 3.5 us for one
// row, 13 for 64, 45 for 256. A draw adds 14 to 22 us for one row, 76 to 82 for 64 (57 of them in
// sample_bins, bound by atomic additions in shared memory), and 150 for one flat row with top-p.
//
// Reference: `expected` in tests/cuda/test_sample.py, the same rules in NumPy with float64.
#include "cuda/kernels/sample.h"
#include "cuda/kernels/sample_search.cuh"

namespace qvl::cuda {

constexpr int kHasFinite = 1;   // a finite logit
constexpr int kHasInvalid = 2;  // a NaN or a positive infinity

__device__ inline bool is_greedy(const Pick& pick) {
  return pick.temperature == 0 || pick.top_p == 0 || pick.top_k == 1;
}

__device__ inline bool likelier(double a, int a_id, double b, int b_id) {
  return a > b || (a == b && a_id < b_id);
}

// Set `best` and `id` to those of the most likely id of the warp's lanes.
__device__ inline void most_likely_of_warp(double& best, int& id) {
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(0xFFFFFFFFu, best, step);
    const int other_id = __shfl_xor_sync(0xFFFFFFFFu, id, step);
    if (likelier(other, other_id, best, id)) best = other, id = other_id;
  }
}

// Write the outputs of a row, and increment the count of its token. token -1: the row is invalid.
__device__ void finish(const SampleParams& p, int row, int token, double log_sum) {
  const float nan = __int_as_float(0x7FC00000);
  p.tokens[row] = token;
  if (token >= 0 && p.picks[row].counts != nullptr) ++p.picks[row].counts[token];
  if (p.logprobs == nullptr) return;
  const float logit = token >= 0 ? p.logits[static_cast<int64>(row) * p.vocab + token] : nan;
  p.logprobs[row] = static_cast<float>(logit - log_sum);
}

// One block per chunk of a row.
extern "C" __global__ void __launch_bounds__(kScanThreads)
    sample_scan(const __grid_constant__ SampleParams p) {
  constexpr int kWarps = kScanWarps;
  __shared__ double bests[kWarps];
  __shared__ int ids[kWarps], all_flags[kWarps];
  __shared__ float maxima[kWarps], sums[kWarps];
  __shared__ uint32 marks[kScanChunk / 32];
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.y, chunk = blockIdx.x, thread = threadIdx.x;
  const int first = chunk * kScanChunk + 4 * thread;
  float values[kScanVectors][4];
  load_logits(p.logits + static_cast<int64>(row) * p.vocab, p.vocab, first, values);
  if (p.any_draw) {  // clear what sample_bins adds to
    for (int i = chunk * kScanThreads + thread; i < kSearchBins; i += p.chunks * kScanThreads) {
      p.bin_weights[static_cast<int64>(row) * kSearchBins + i] = 0;
      p.bin_counts[static_cast<int64>(row) * kSearchBins + i] = 0;
    }
    if (chunk == 0 && thread == 0) p.kept[row].n = p.kept[row].blocks_done = 0;
  }
  Row changes(p, row);
  if (changes.marks != nullptr) {
    const Pick& pick = p.picks[row];
    const int start = chunk * kScanChunk;
    for (int i = thread; i < kScanChunk / 32; i += kScanThreads) marks[i] = 0;
    __syncthreads();
    bool any_marked = false;
    for (int i = thread; i < pick.n_forbidden; i += kScanThreads) {
      const int bit = p.forbidden[pick.first_forbidden + i] - start;
      if (bit < 0 || bit >= kScanChunk) continue;
      atomicOr(marks + bit / 32, 1u << bit % 32);
      any_marked = true;
    }
    any_marked = __syncthreads_or(any_marked);
    for (int i = thread; p.any_draw && i < kScanChunk / 32; i += kScanThreads)
      p.marks[static_cast<int64>(row) * p.mark_words + start / 32 + i] = marks[i];
    changes.marks = any_marked ? marks : nullptr;
    changes.first_marked = start;
  }
  float maximum = -infinity();
  int id = 0x7FFFFFFF, flags = 0;
#pragma unroll
  for (int v = 0; v < kScanVectors; ++v) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float x = values[v][j];
      if (!(x < infinity())) flags |= kHasInvalid;
      if (fabsf(x) < infinity()) flags |= kHasFinite;
      if (x > maximum) {
        maximum = x;
        id = first + 4 * v * kScanThreads + j;
      }
    }
  }
  double best = maximum;
  if (changes.changed()) {
    best = -infinity();
    id = 0x7FFFFFFF;
    for (int v = 0; v < kScanVectors; ++v) {
      for (int j = 0; j < 4; ++j) {
        const int id_of_logit = first + 4 * v * kScanThreads + j;
        if (id_of_logit >= p.vocab) continue;
        const double value = changes.value(id_of_logit, values[v][j]);
        if (value > best) best = value, id = id_of_logit;
      }
    }
  }
  most_likely_of_warp(best, id);
  flags = (__any_sync(0xFFFFFFFFu, flags & kHasFinite) ? kHasFinite : 0) |
          (__any_sync(0xFFFFFFFFu, flags & kHasInvalid) ? kHasInvalid : 0);
  maximum = warp_max(maximum);
  if (thread % 32 == 0) {
    bests[thread / 32] = best;
    ids[thread / 32] = id;
    all_flags[thread / 32] = flags;
    maxima[thread / 32] = maximum;
    if (p.n_top > 0)
      p.warp_maxima[(static_cast<int64>(row) * p.chunks + chunk) * kWarps + thread / 32] = maximum;
  }
  __syncthreads();
  float sum = 0;
  if (p.want_log_sum) {
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, maxima[w]);
    if (maximum > -infinity()) {
#pragma unroll
      for (int v = 0; v < kScanVectors; ++v) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += expf(values[v][j] - maximum);
      }
    }
    sum = warp_sum(sum);
    if (thread % 32 == 0) sums[thread / 32] = sum;
    __syncthreads();
  }
  if (thread != 0) return;
  ChunkPeak peak{best, id, flags, maximum, sum};
  for (int w = 1; w < kWarps; ++w) {
    if (likelier(bests[w], ids[w], peak.best, peak.id)) peak.best = bests[w], peak.id = ids[w];
    peak.flags |= all_flags[w];
    if (p.want_log_sum) peak.sum += sums[w];
  }
  p.peaks[static_cast<int64>(row) * p.chunks + chunk] = peak;
}

// One warp per row.
extern "C" __global__ void __launch_bounds__(32) sample_peak(const __grid_constant__ SampleParams p) {
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.x, lane = threadIdx.x;
  const ChunkPeak* peaks = p.peaks + static_cast<int64>(row) * p.chunks;
  const bool greedy = is_greedy(p.picks[row]);
  double best = -infinity(), log_sum = 0;
  int id = 0x7FFFFFFF, flags = 0;
  float maximum = -infinity();
  for (int c = lane; c < p.chunks; c += 32) {
    const ChunkPeak peak = peaks[c];
    if (likelier(peak.best, peak.id, best, id)) best = peak.best, id = peak.id;
    flags |= peak.flags;
    maximum = fmaxf(maximum, peak.maximum);
  }
  most_likely_of_warp(best, id);
  const bool finite = __any_sync(0xFFFFFFFFu, flags & kHasFinite);
  const bool invalid = __any_sync(0xFFFFFFFFu, flags & kHasInvalid);
  if (p.want_log_sum) {
    maximum = warp_max(maximum);
    double total = 0;
    for (int c = lane; c < p.chunks; c += 32)
      total += peaks[c].sum * exp(static_cast<double>(peaks[c].maximum) - maximum);
    for (int distance = 16; distance > 0; distance /= 2)
      total += __shfl_xor_sync(0xFFFFFFFFu, total, distance);
    log_sum = maximum + log(total);
  }
  if (lane != 0) return;
  if (!finite || invalid) id = -1;
  p.states[row] = {best, log_sum, id};
  if (id < 0 || greedy) finish(p, row, id, log_sum);
}

__device__ inline bool draws(const Pick& pick, const RowState& state) {
  return state.peak >= 0 && !is_greedy(pick);
}

// Target for top-p: the first id at which the running weight exceeds the target is the last one in top-p.
__device__ inline uint64 top_p_target(const Pick& pick, uint64 mass) {
  const uint64 least = __double2ull_ru(static_cast<double>(pick.top_p) * static_cast<double>(mass));
  return min(max(least, 1ull), mass) - 1;
}

__device__ inline uint64 draw_target(const Pick& pick, uint64 mass) {
  return min(__double2ull_rd(pick.fraction * static_cast<double>(mass)), mass - 1);
}

// With the complete bins of a row, find the bin in which the first search of sample_draw ends, and choose the
// keys to keep: those of this bin and, unless there is only one search, of all bins before it, since later
// searches end at or before the first.
__device__ void choose_kept(const SampleParams& p, int row, const Pick& pick) {
  constexpr int kThreadBins = kSearchBins / kScanThreads;
  __shared__ uint64 scratch[2][kScanWarps];
  const int thread = threadIdx.x;
  const int64 bin = static_cast<int64>(row) * kSearchBins + kThreadBins * thread;
  const auto* weight_pairs = reinterpret_cast<const ulonglong2*>(p.bin_weights + bin);
  const auto* count_pairs = reinterpret_cast<const uint2*>(p.bin_counts + bin);
  uint64 weights[kThreadBins], counts[kThreadBins], weight = 0, count = 0;
#pragma unroll
  for (int i = 0; i < kThreadBins; i += 2) {
    const ulonglong2 two = __ldcg(weight_pairs + i / 2);
    const uint2 numbers = __ldcg(count_pairs + i / 2);
    weights[i] = two.x, weights[i + 1] = two.y;
    counts[i] = numbers.x, counts[i + 1] = numbers.y;
    weight += two.x + two.y;
    count += static_cast<uint64>(numbers.x) + numbers.y;
  }
  uint64 all_count, mass;
  count = sum_before<kScanWarps>(count, scratch[0], all_count);
  weight = sum_before<kScanWarps>(weight, scratch[1], mass);
  const bool by_count = pick.top_k > 0 && static_cast<uint64>(pick.top_k) <= all_count;
  const bool one_search = !by_count && pick.top_p >= 1;
  const uint64 target = by_count     ? static_cast<uint64>(pick.top_k - 1)
                        : one_search ? draw_target(pick, mass)
                                     : top_p_target(pick, mass);
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) {
    const uint64 before = by_count ? count : weight, in_bin = by_count ? counts[i] : weights[i];
    if (before <= target && target - before < in_bin) {
      const int last = kThreadBins * thread + i;
      KeptIds& kept = p.kept[row];
      kept.by_count = by_count;
      kept.mass = mass;
      kept.base_count = one_search ? count : 0;
      kept.base_weight = one_search ? weight : 0;
      kept.first_key = one_search ? static_cast<uint64>(last) << kBinShift : 0;
      kept.last_key = (static_cast<uint64>(last + 1) << kBinShift) - 1;
      kept.too_many = counts[i] + (one_search ? 0 : count) > kMaxKept;
    }
    count += counts[i];
    weight += weights[i];
  }
}

// One block per bin_vectors * 4 * kScanThreads logits of a row: fill the bins of the first level. The last
// block of a row to finish runs choose_kept.
extern "C" __global__ void __launch_bounds__(kScanThreads)
    sample_bins(const __grid_constant__ SampleParams p) {
  __shared__ Bins bins;
  __shared__ bool last;
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.y;
  const Pick pick = p.picks[row];
  const RowState state = p.states[row];
  if (!draws(pick, state)) return;
  bins.clear();
  const DrawItems items(p, row, pick, state);
  const int first = 4 * (blockIdx.x * p.bin_vectors * kScanThreads + threadIdx.x);
  for (int v = 0; v < p.bin_vectors; ++v) {
    float values[1][4];
    load_logits(items.row.logits, p.vocab, first + 4 * v * kScanThreads, values);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int id = first + 4 * v * kScanThreads + j;
      uint64 key;
      if (id < p.vocab && items.get_key(id, values[0][j], key))
        bins.add(static_cast<int>(key >> kBinShift), items.weight(key));
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSearchBins; i += kScanThreads) {
    if (bins.counts[i] == 0) continue;
    const int64 at = static_cast<int64>(row) * kSearchBins + i;
    atomicAdd(p.bin_counts + at, bins.counts[i]);
    atomicAdd(p.bin_weights + at, bins.weight(i));
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&p.kept[row].blocks_done, 1) + 1 == gridDim.x;
  __syncthreads();
  if (!last) return;
  __threadfence();
  choose_kept(p, row, pick);
}

// Gather the ids that choose_kept has chosen. Blocks as for sample_bins.
extern "C" __global__ void __launch_bounds__(kScanThreads)
    sample_keep(const __grid_constant__ SampleParams p) {
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.y;
  const Pick pick = p.picks[row];
  const RowState state = p.states[row];
  KeptIds& kept = p.kept[row];
  if (!draws(pick, state) || kept.too_many) return;
  const uint64 first_key = kept.first_key, last_key = kept.last_key;
  DrawItems items(p, row, pick, state);
  items.narrow(first_key, last_key);
  const int first = 4 * (blockIdx.x * p.bin_vectors * kScanThreads + threadIdx.x);
  for (int v = 0; v < p.bin_vectors; ++v) {
    float values[1][4];
    load_logits(items.row.logits, p.vocab, first + 4 * v * kScanThreads, values);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int id = first + 4 * v * kScanThreads + j;
      uint64 key;
      if (id < p.vocab && items.contains(values[0][j]) && items.get_key(id, values[0][j], key) &&
          key >= first_key && key <= last_key)
        p.kept_keys[static_cast<int64>(row) * kMaxKept + atomicAdd(&kept.n, 1)] = key;
    }
  }
}

// One block per row: restrict the row to top-k, then to top-p, and draw the token at `fraction` of the
// remaining weight.
extern "C" __global__ void __launch_bounds__(kSearchThreads, 1)
    sample_draw(const __grid_constant__ SampleParams p) {
  __shared__ SearchScratch scratch;
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.x;
  const Pick pick = p.picks[row];
  const RowState state = p.states[row];
  if (!draws(pick, state)) return;
  DrawItems items(p, row, pick, state);
  Search<DrawItems> search(scratch, items, items.row.logits, p.vocab, p, row);
  const KeptIds kept = p.kept[row];
  if (kept.n > 0) search.begin_with(kept, p.kept_keys + static_cast<int64>(row) * kMaxKept);
  uint64 key, mass = kept.mass, through;
  if (kept.by_count) {
    search.find(/*by_count=*/true, static_cast<uint64>(pick.top_k - 1), /*keep_all=*/false, key, through);
    mass = through;
  }
  if (pick.top_p < 1) {
    search.find(/*by_count=*/false, top_p_target(pick, mass), /*keep_all=*/false, key, through);
    mass = through;
  }
  search.find(/*by_count=*/false, draw_target(pick, mass), /*keep_all=*/false, key, through);
  if (threadIdx.x == 0) finish(p, row, static_cast<int>(key & ((1u << kIdBits) - 1)), state.log_sum);
}

// One block per row: the n_top most likely tokens.
extern "C" __global__ void __launch_bounds__(kSearchThreads, 1)
    sample_top(const __grid_constant__ SampleParams p) {
  __shared__ SearchScratch scratch;
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.x, thread = threadIdx.x;
  const RowState state = p.states[row];
  const bool invalid = state.peak < 0;
  TopItems items(p.logits + static_cast<int64>(row) * p.vocab);
  if (!invalid) {
    Search<TopItems> search(scratch, items, items.logits, p.vocab, p, row);
    // The n_top-th largest of the warps' maxima is a lower bound for the n_top-th logit; usually few logits
    // exceed it.
    const int n_maxima = min(p.chunks * kScanWarps, kSearchThreads);
    if (thread < n_maxima)
      scratch.keys[thread] =
          items.key(0xFFFFFFFF, p.warp_maxima[static_cast<int64>(row) * p.chunks * kScanWarps + thread]);
    search.sort(n_maxima);
    uint64 key = p.n_top <= n_maxima ? scratch.keys[p.n_top - 1] : ~0ull, through;
    if (!search.keep_up_to(key))
      search.find(/*by_count=*/true, static_cast<uint64>(p.n_top - 1), /*keep_all=*/true, key, through);
  }
  if (thread >= p.n_top) return;
  const int id = invalid ? -1 : static_cast<int>(scratch.keys[thread] & 0xFFFFFFFF);
  const int64 at = static_cast<int64>(row) * p.n_top + thread;
  p.top_tokens[at] = id;
  p.top_logprobs[at] =
      invalid ? __int_as_float(0x7FC00000) : static_cast<float>(items.logits[id] - state.log_sum);
}

}  // namespace qvl::cuda
