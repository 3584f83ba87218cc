// Picking tokens from rows of logits, float32 [n, vocab].
//
// The parts, each a launch: sample_scan (a block for each 4096 logits: its likeliest id, its checks, its part
// of the softmax's sum, its forbidden ids as bits), sample_peak (a warp a row puts them together: greedy rows
// are done); where a row draws sample_bins, sample_keep and sample_draw; and where log-probabilities of the
// likeliest are wanted sample_top.
//
// Greedy, one row of 151,936: 608 KB from the L2 cache, in which the product before left it, by 38 blocks
// with 64 bytes on their way a thread, then 38 small structs: two launches and little more. 256 rows are 156
// MB: 36 us at the memory's rate.
//
// A draw needs the order of the likeliest and sums in that order, but not of all 151,936. Ids get a key: how
// far their logit lies under the largest, in temperatures, in steps of 2^-35, then the id; what is 32 or more
// under it weighs nothing. Weights exp(-distance) are whole numbers, so that sums do not depend on the order
// of the additions, and atomic additions give the same bits however the row is shared among blocks. Where a
// running sum (of ids for top-k, of weights for top-p and the draw) crosses a value is found by the bin of
// the key's first 11 bits (sample_bins, all blocks of a row), and then by putting the ids of that bin in
// order, and with them all before it where later sums need those. If they are 2048 or fewer, sample_keep, all
// blocks of a row, gathers them, and sample_draw, one block a row, does not read the row. Else, in flat rows,
// it counts bins of the next 11 bits, and reads the row a few times, at about 6 us each.
#include "cuda/kernels/common.cuh"
#include "cuda/kernels/sample.h"

namespace qvl::cuda {

constexpr int kHasFinite = 1, kHasNan = 2;
constexpr int kIdBits = 24, kStepBits = 35;       // of a key for draws
constexpr uint64 kFarthest = 32ull << kStepBits;  // in steps; with kIdBits these are 64 bits
constexpr uint64 kLog2E = 6653256548922161246;    // log2(e) * 2^62
constexpr double kForbidden = -1e10;

__device__ inline float infinity() {
  return __int_as_float(0x7F800000);
}

__device__ inline bool is_greedy(const Pick& pick) {
  return pick.temperature == 0 || pick.top_p == 0 || pick.top_k == 1;
}

// A row's logits as its penalties and forbidden ids leave them.
struct Row {
  const float* logits;
  const int* counts;    // NULL without penalties
  const uint32* marks;  // NULL without forbidden ids; bit 0 is id first_marked
  int first_marked = 0;
  double repetition, frequency, presence;

  __device__ Row(const SampleParams& p, int row) : logits(p.logits + static_cast<int64>(row) * p.vocab) {
    const Pick& pick = p.picks[row];
    repetition = pick.repetition_penalty;
    frequency = pick.frequency_penalty;
    presence = pick.presence_penalty;
    const bool penalised = p.any_changed && (repetition != 1 || frequency != 0 || presence != 0);
    counts = penalised ? pick.counts : nullptr;
    marks =
        p.any_changed && pick.n_forbidden > 0 ? p.marks + static_cast<int64>(row) * p.mark_words : nullptr;
  }

  __device__ bool changed() const { return counts != nullptr || marks != nullptr; }

  // Rounded after each operation, as on the CPU.
  __device__ double value(int id, float logit) const {
    double value = logit;
    const int bit = id - first_marked;
    if (marks != nullptr && (marks[bit / 32] >> bit % 32 & 1) != 0) value = kForbidden;
    const int count = counts != nullptr ? counts[id] : 0;
    if (count <= 0) return value;
    value = value < 0 ? value * repetition : value / repetition;
    return __dadd_rn(value, -__dadd_rn(__dmul_rn(count, frequency), presence));
  }
};

// A thread's logits of kVectors float4 from `first` on, 4 * threads apart; -infinity behind the row.
template <int kVectors>
__device__ void load_logits(const float* logits, int vocab, int first, float (&values)[kVectors][4]) {
  const int step = 4 * blockDim.x;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = first + v * step;
    if (vocab % 4 == 0) {
      float4 four{-infinity(), -infinity(), -infinity(), -infinity()};
      if (i < vocab) four = *reinterpret_cast<const float4*>(logits + i);
      values[v][0] = four.x, values[v][1] = four.y, values[v][2] = four.z, values[v][3] = four.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[v][j] = i + j < vocab ? logits[i + j] : -infinity();
    }
  }
}

__device__ inline bool likelier(double a, int a_id, double b, int b_id) {
  return a > b || (a == b && a_id < b_id);
}

__device__ inline void likeliest_of_warp(double& best, int& id) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const double other = __shfl_xor_sync(0xFFFFFFFFu, best, lane);
    const int other_id = __shfl_xor_sync(0xFFFFFFFFu, id, lane);
    if (likelier(other, other_id, best, id)) best = other, id = other_id;
  }
}

__device__ void finish(const SampleParams& p, int row, int token, double floor) {
  const float nan = __int_as_float(0x7FC00000);
  p.tokens[row] = token;
  if (token >= 0 && p.picks[row].counts != nullptr) ++p.picks[row].counts[token];
  if (p.logprobs == nullptr) return;
  const float logit = token >= 0 ? p.logits[static_cast<int64>(row) * p.vocab + token] : nan;
  p.logprobs[row] = static_cast<float>(logit - floor);
}

// A block for each chunk of each row.
extern "C" __global__ void __launch_bounds__(kScanThreads)
    sample_scan(const __grid_constant__ SampleParams p) {
  constexpr int kWarps = kScanWarps;
  __shared__ double bests[kWarps];
  __shared__ int ids[kWarps], all_flags[kWarps];
  __shared__ float mosts[kWarps], sums[kWarps];
  __shared__ uint32 marks[kScanChunk / 32];
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.y, chunk = blockIdx.x, thread = threadIdx.x;
  const int first = chunk * kScanChunk + 4 * thread;
  float values[kScanVectors][4];
  load_logits(p.logits + static_cast<int64>(row) * p.vocab, p.vocab, first, values);
  if (p.any_draw) {  // sample_bins adds to them
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
    bool some = false;
    for (int i = thread; i < pick.n_forbidden; i += kScanThreads) {
      const int bit = p.forbidden[pick.first_forbidden + i] - start;
      if (bit < 0 || bit >= kScanChunk) continue;
      atomicOr(marks + bit / 32, 1u << bit % 32);
      some = true;
    }
    some = __syncthreads_or(some);
    for (int i = thread; p.any_draw && i < kScanChunk / 32; i += kScanThreads)
      p.marks[static_cast<int64>(row) * p.mark_words + start / 32 + i] = marks[i];
    changes.marks = some ? marks : nullptr;
    changes.first_marked = start;
  }
  float most = -infinity();
  int id = 0x7FFFFFFF, flags = 0;
#pragma unroll
  for (int v = 0; v < kScanVectors; ++v) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float x = values[v][j];
      if (x != x) flags |= kHasNan;
      if (fabsf(x) < infinity()) flags |= kHasFinite;
      if (x > most) {
        most = x;
        id = first + 4 * v * kScanThreads + j;
      }
    }
  }
  double best = most;
  if (changes.changed()) {
    best = -infinity();
    id = 0x7FFFFFFF;
    for (int v = 0; v < kScanVectors; ++v) {
      for (int j = 0; j < 4; ++j) {
        const int here = first + 4 * v * kScanThreads + j;
        if (here >= p.vocab) continue;
        const double value = changes.value(here, values[v][j]);
        if (value > best) best = value, id = here;
      }
    }
  }
  likeliest_of_warp(best, id);
  flags = (__any_sync(0xFFFFFFFFu, flags & kHasFinite) ? kHasFinite : 0) |
          (__any_sync(0xFFFFFFFFu, flags & kHasNan) ? kHasNan : 0);
  most = warp_max(most);
  if (thread % 32 == 0) {
    bests[thread / 32] = best;
    ids[thread / 32] = id;
    all_flags[thread / 32] = flags;
    mosts[thread / 32] = most;
    if (p.n_top > 0) p.warp_mosts[(static_cast<int64>(row) * p.chunks + chunk) * kWarps + thread / 32] = most;
  }
  __syncthreads();
  float sum = 0;
  if (p.want_floor) {
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, mosts[w]);
    if (most > -infinity()) {
#pragma unroll
      for (int v = 0; v < kScanVectors; ++v) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += expf(values[v][j] - most);
      }
    }
    sum = warp_sum(sum);
    if (thread % 32 == 0) sums[thread / 32] = sum;
    __syncthreads();
  }
  if (thread != 0) return;
  ChunkPeak peak{best, id, flags, most, sum};
  for (int w = 1; w < kWarps; ++w) {
    if (likelier(bests[w], ids[w], peak.best, peak.id)) peak.best = bests[w], peak.id = ids[w];
    peak.flags |= all_flags[w];
    if (p.want_floor) peak.sum += sums[w];
  }
  p.peaks[static_cast<int64>(row) * p.chunks + chunk] = peak;
}

// A warp a row.
extern "C" __global__ void __launch_bounds__(32) sample_peak(const __grid_constant__ SampleParams p) {
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.x, lane = threadIdx.x;
  const ChunkPeak* peaks = p.peaks + static_cast<int64>(row) * p.chunks;
  const bool greedy = is_greedy(p.picks[row]);
  double best = -infinity(), floor = 0;
  int id = 0x7FFFFFFF, flags = 0;
  float most = -infinity();
  for (int c = lane; c < p.chunks; c += 32) {
    const ChunkPeak peak = peaks[c];
    if (likelier(peak.best, peak.id, best, id)) best = peak.best, id = peak.id;
    flags |= peak.flags;
    most = fmaxf(most, peak.most);
  }
  likeliest_of_warp(best, id);
  const bool finite = __any_sync(0xFFFFFFFFu, flags & kHasFinite);
  const bool broken = __any_sync(0xFFFFFFFFu, flags & kHasNan);
  if (p.want_floor) {
    most = warp_max(most);
    double total = 0;
    for (int c = lane; c < p.chunks; c += 32)
      total += peaks[c].sum * exp(static_cast<double>(peaks[c].most) - most);
    for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, other);
    floor = most + log(total);
  }
  if (lane != 0) return;
  if (!finite || broken) id = -1;
  p.states[row] = {best, floor, id};
  // A row with an infinity has no distribution: its likeliest token.
  if (id < 0 || greedy || isinf(best)) finish(p, row, id, floor);
}

__device__ inline bool draws(const Pick& pick, const RowState& state) {
  return state.peak >= 0 && !is_greedy(pick) && !isinf(state.best);
}

// Logits that are worth a closer look: those of a range of keys lie in it.
struct Near {
  float low, high;  // a NaN is no bound

  __device__ bool near(float logit) const { return !(logit < low || logit > high); }
};

// The ids of a row with weights, in the order of draws.
struct DrawItems : Near {
  static constexpr bool kHasFirstBins = true;  // from sample_bins
  Row row;
  double best, steps;  // steps in a difference of 1
  int weight_shift;

  __device__ DrawItems(const SampleParams& p, int number, const Pick& pick, const RowState& state)
      : row(p, number),
        best(state.best),
        steps((1ull << kStepBits) / static_cast<double>(pick.temperature)),
        weight_shift(p.weight_shift) {}

  // Of the distance in the key alone, off by a few parts in ten million: 2^-t, t the distance times log2(e).
  __device__ uint64 weight(uint64 key) const {
    const uint64 t = __umul64hi(key >> kIdBits << 24, kLog2E);  // in steps of 2^-57
    const float part = static_cast<float>(static_cast<uint32>(t >> 25)) * 0x1p-32f;
    const uint64 mantissa = static_cast<uint64>(exp2f(-part) * 0x1p31f);
    return mantissa << weight_shift >> (t >> 57);
  }

  // Only ids with keys first to last are asked for from now on.
  __device__ void narrow(uint64 first, uint64 last) {
    low = -infinity();
    high = infinity();
    if (row.changed()) return;
    const double from = (first >> kIdBits) / steps, to = ((last >> kIdBits) + 1) / steps;
    const double slack = 1e-6 * (fabs(best) + to);
    high = static_cast<float>(best - from + slack);
    low = static_cast<float>(best - to - slack);
  }

  // Whether the id has a key, and which.
  __device__ bool get(int id, float logit, uint64& key) const {
    const double distance = (best - row.value(id, logit)) * steps;
    if (!(distance < static_cast<double>(kFarthest))) return false;
    key = __double2ull_rd(distance) << kIdBits | static_cast<uint32>(id);
    return true;
  }
};

// The ids of a row in the order of its unchanged logits; they weigh nothing.
struct TopItems : Near {
  static constexpr bool kHasFirstBins = false;
  const float* logits;

  __device__ explicit TopItems(const float* logits) : logits(logits) {}

  __device__ static uint32 upper(float logit) {
    const uint32 bits = __float_as_uint(logit + 0.f);  // -0 becomes 0
    return bits >> 31 != 0 ? bits : bits ^ 0x7FFFFFFF;
  }
  __device__ uint64 weight(uint64) const { return 0; }
  __device__ static float logit_of(uint32 upper) {
    return __uint_as_float(upper >> 31 != 0 ? upper : upper ^ 0x7FFFFFFF);
  }
  __device__ void narrow(uint64 first, uint64 last) {
    low = logit_of(static_cast<uint32>(last >> 32));
    high = logit_of(static_cast<uint32>(first >> 32));
  }
  __device__ uint64 key(uint32 id, float logit) const { return static_cast<uint64>(upper(logit)) << 32 | id; }
  __device__ bool get(int id, float logit, uint64& key_) const {
    key_ = key(static_cast<uint32>(id), logit);
    return true;
  }
};

// Weights and numbers of ids by bin, in shared memory. A weight is in two words: atomic additions of 64 bits
// are loops there.
struct Bins {
  uint32 low[kSearchBins], high[kSearchBins], counts[kSearchBins];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kSearchBins; i += blockDim.x) low[i] = high[i] = counts[i] = 0;
    __syncthreads();
  }
  __device__ void add(int bin, uint64 weight) {
    atomicAdd(counts + bin, 1);
    const auto part = static_cast<uint32>(weight);
    uint32 rest = static_cast<uint32>(weight >> 32);
    if (part != 0 && atomicAdd(low + bin, part) + part < part) ++rest;
    if (rest != 0) atomicAdd(high + bin, rest);
  }
  __device__ uint64 weight(int bin) const { return static_cast<uint64>(high[bin]) << 32 | low[bin]; }
};

constexpr int kBinShift = 53;  // of the first level: the upper 11 bits of a key

// What the values of the threads before this one add up to, and those of all. `room`: kWarps numbers.
template <int kWarps>
__device__ uint64 sum_before(uint64 value, uint64* room, uint64& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64 sum = value;
  for (int far = 1; far < 32; far *= 2) {
    const uint64 other = __shfl_up_sync(0xFFFFFFFFu, sum, far);
    if (lane >= far) sum += other;
  }
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  uint64 warps = lane < kWarps ? room[lane] : 0;
  for (int far = 1; far < kWarps; far *= 2) {
    const uint64 other = __shfl_up_sync(0xFFFFFFFFu, warps, far);
    if (lane >= far) warps += other;
  }
  all = __shfl_sync(0xFFFFFFFFu, warps, kWarps - 1);
  const uint64 before = __shfl_sync(0xFFFFFFFFu, warps, warp == 0 ? 0 : warp - 1);
  return sum - value + (warp == 0 ? 0 : before);
}

// The id with which the weights are over this is the last that top-p leaves: no less than top_p of the mass.
__device__ inline uint64 top_p_target(const Pick& pick, uint64 mass) {
  const uint64 least = __double2ull_ru(static_cast<double>(pick.top_p) * static_cast<double>(mass));
  return min(max(least, 1ull), mass) - 1;
}

__device__ inline uint64 draw_target(const Pick& pick, uint64 mass) {
  return min(__double2ull_rd(pick.fraction * static_cast<double>(mass)), mass - 1);
}

// A row's bins are whole: find the one in which the first of sample_draw's searches ends, later ones ending
// no later. All before it are wanted, too, unless there is no other search.
__device__ void choose_kept(const SampleParams& p, int row, const Pick& pick) {
  constexpr int kEach = kSearchBins / kScanThreads;
  __shared__ uint64 room[2][kScanWarps];
  const int thread = threadIdx.x;
  const int64 bin = static_cast<int64>(row) * kSearchBins + kEach * thread;
  const auto* weight_pairs = reinterpret_cast<const ulonglong2*>(p.bin_weights + bin);
  const auto* count_pairs = reinterpret_cast<const uint2*>(p.bin_counts + bin);
  uint64 weights[kEach], counts[kEach], weight = 0, count = 0;
#pragma unroll
  for (int i = 0; i < kEach; i += 2) {
    const ulonglong2 two = __ldcg(weight_pairs + i / 2);
    const uint2 numbers = __ldcg(count_pairs + i / 2);
    weights[i] = two.x, weights[i + 1] = two.y;
    counts[i] = numbers.x, counts[i + 1] = numbers.y;
    weight += two.x + two.y;
    count += static_cast<uint64>(numbers.x) + numbers.y;
  }
  uint64 all_count, mass;
  count = sum_before<kScanWarps>(count, room[0], all_count);
  weight = sum_before<kScanWarps>(weight, room[1], mass);
  const bool by_count = pick.top_k > 0 && static_cast<uint64>(pick.top_k) <= all_count;
  const bool one_search = !by_count && pick.top_p >= 1;
  const uint64 target = by_count     ? static_cast<uint64>(pick.top_k - 1)
                        : one_search ? draw_target(pick, mass)
                                     : top_p_target(pick, mass);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint64 before = by_count ? count : weight, here = by_count ? counts[i] : weights[i];
    if (before <= target && target - before < here) {
      const int last = kEach * thread + i;
      KeptIds& kept = p.kept[row];
      kept.by_count = by_count;
      kept.mass = mass;
      kept.base_count = one_search ? count : 0;
      kept.base_weight = one_search ? weight : 0;
      kept.first_key = one_search ? static_cast<uint64>(last) << kBinShift : 0;
      kept.last_key = (static_cast<uint64>(last + 1) << kBinShift) - 1;
      kept.too_many = counts[i] + (one_search ? 0 : count) > kKept;
    }
    count += counts[i];
    weight += weights[i];
  }
}

// A block for each bin_vectors * 4 * kScanThreads logits of each row: the bins of the first level. A row's
// last block to end looks at the whole.
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
      if (id < p.vocab && items.get(id, values[0][j], key))
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

// The same blocks: gather the ids that were chosen.
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
      if (id < p.vocab && items.near(values[0][j]) && items.get(id, values[0][j], key) && key >= first_key &&
          key <= last_key)
        p.kept_keys[static_cast<int64>(row) * kKept + atomicAdd(&kept.n, 1)] = key;
    }
  }
}

constexpr int kNowhere = -1;

struct SearchRoom {
  union {
    Bins bins;
    uint64 weights[kKept];  // of the kept
  };
  uint64 keys[kKept];
  uint64 sums[2][32];
  uint64 before_count, before_weight;  // what lies before the place that crossing() found
  uint64 here_count, here_weight;
  int found;
  int n_kept;
};

// Where running sums over a row's ids cross a value. All threads of a block of kSearchThreads call with the
// same arguments.
template <typename Items>
class Search {
 public:
  __device__ Search(SearchRoom& room, Items& items, const float* logits, int vocab, const SampleParams& p,
                    int row)
      : room_(room), items_(items), logits_(logits), vocab_(vocab) {
    bin_weights_ = p.bin_weights + static_cast<int64>(row) * kSearchBins;
    bin_counts_ = p.bin_counts + static_cast<int64>(row) * kSearchBins;
  }

  // Begin with ids that have been gathered.
  __device__ void begin_with(const KeptIds& kept, const uint64* keys) {
    n_kept_ = kept.n;
    base_count_ = kept.base_count;
    base_weight_ = kept.base_weight;
    for (int i = threadIdx.x; i < n_kept_; i += kSearchThreads) room_.keys[i] = keys[i];
    put_in_order();
  }

  // Keep the ids with keys up to `last`. False if they are too many.
  __device__ bool keep_up_to(uint64 last) {
    base_count_ = base_weight_ = 0;
    gather(0, last);
    return n_kept_ > 0;
  }

  // Bitonic, of the first n keys: rounds of comparisons of keys a power of two apart. Those at most 32 apart
  // stay in a warp.
  __device__ void sort(int n) {
    int whole = 2;
    while (whole < n) whole *= 2;
    for (int i = n + threadIdx.x; i < whole; i += kSearchThreads) room_.keys[i] = ~0ull;
    __syncthreads();
    const int thread = threadIdx.x;
    for (int run = 2; run <= whole; run *= 2) {
      for (int apart = run / 2; apart > 0; apart /= 2) {
        const int i = 2 * thread - (thread & (apart - 1));
        if (thread < whole / 2) {
          const uint64 a = room_.keys[i], b = room_.keys[i + apart];
          if ((a > b) == ((i & run) == 0)) {
            room_.keys[i] = b;
            room_.keys[i + apart] = a;
          }
        }
        const int next = apart > 1 ? apart / 2 : run;
        if (apart > 32 || next > 32) {
          __syncthreads();
        } else {
          __syncwarp();
        }
      }
    }
    __syncthreads();
  }

  // The first id, in order, with which the number of ids, or their weight, is over `target`: its key, and
  // the weight up to and with it. False if all are not over it. The ids in order up to it are kept, all of
  // them if `whole`.
  __device__ bool find(bool by_count, uint64 target, bool whole, uint64& key, uint64& through) {
    if (!find_kept(by_count, target, key, through)) {
      if (!keep(by_count, target, whole)) return false;
      find_kept(by_count, target, key, through);
    }
    return true;
  }

 private:
  // Call each(key) for the ids of the row with keys first to last.
  template <typename Each>
  __device__ void each_item(uint64 first_key, uint64 last_key, Each&& each) {
    constexpr int kVectors = 4;
    items_.narrow(first_key, last_key);
    for (int first = 4 * threadIdx.x; first < vocab_; first += 4 * kVectors * kSearchThreads) {
      float values[kVectors][4];
      load_logits(logits_, vocab_, first, values);
      uint32 near = 0;  // a bit for each that may be one: mostly few are
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int j = 0; j < 4; ++j) near |= items_.near(values[v][j]) ? 1u << (4 * v + j) : 0;
      }
      for (; near != 0; near &= near - 1) {
        const int bit = __ffs(near) - 1, id = first + bit / 4 * 4 * kSearchThreads + bit % 4;
        uint64 key;
        if (id < vocab_ && items_.get(id, logits_[id], key) && key >= first_key && key <= last_key) each(key);
      }
    }
  }

  // The bins of the keys that begin with `prefix`, at the level of `shift`.
  __device__ void fill(int shift, uint64 prefix) {
    Bins& bins = room_.bins;
    __syncthreads();
    if (Items::kHasFirstBins && shift == kBinShift) {
      for (int i = threadIdx.x; i < kSearchBins; i += kSearchThreads) {
        const uint64 weight = bin_weights_[i];
        bins.low[i] = static_cast<uint32>(weight);
        bins.high[i] = static_cast<uint32>(weight >> 32);
        bins.counts[i] = bin_counts_[i];
      }
    } else {
      const int above = shift + 11;
      const uint64 first = above < 64 ? prefix << above : 0;
      const uint64 last = above < 64 ? ((prefix + 1) << above) - 1 : ~0ull;
      bins.clear();
      each_item(first, last, [&](uint64 key) {
        bins.add(static_cast<int>(key >> shift & (kSearchBins - 1)), items_.weight(key));
      });
    }
    __syncthreads();
  }

  // Of this thread's two of 2048 places: sets `found` to the one in which the running sum crosses target.
  __device__ void crossing(const uint64 (&counts)[2], const uint64 (&weights)[2], bool by_count,
                           uint64 target) {
    if (threadIdx.x == 0) room_.found = kNowhere;
    uint64 all;
    uint64 count = sum_before<32>(counts[0] + counts[1], room_.sums[0], all);
    uint64 weight = sum_before<32>(weights[0] + weights[1], room_.sums[1], all);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64 before = by_count ? count : weight, here = by_count ? counts[i] : weights[i];
      if (before <= target && target - before < here) {
        room_.found = 2 * threadIdx.x + i;
        room_.before_count = count;
        room_.before_weight = weight;
        room_.here_count = counts[i];
        room_.here_weight = weights[i];
      }
      count += counts[i];
      weight += weights[i];
    }
    __syncthreads();
  }

  __device__ void cross_bins(bool by_count, uint64 target) {
    const int at = 2 * threadIdx.x;
    const Bins& bins = room_.bins;
    crossing({bins.counts[at], bins.counts[at + 1]}, {bins.weight(at), bins.weight(at + 1)}, by_count,
             target);
  }

  // Keep the ids among which the sum crosses, in order. False if it does nowhere.
  __device__ bool keep(bool by_count, uint64 target, bool whole) {
    uint64 prefix = 0, left = target;
    base_count_ = base_weight_ = 0;
    n_kept_ = 0;
    int shift = kBinShift;
    bool all;  // that lie before, too
    for (;; shift -= 11) {
      fill(shift, prefix);
      cross_bins(by_count, left);
      if (room_.found == kNowhere) return false;
      prefix = prefix * kSearchBins + static_cast<uint64>(room_.found);
      left -= by_count ? room_.before_count : room_.before_weight;
      base_count_ += room_.before_count;
      base_weight_ += room_.before_weight;
      all = base_count_ + room_.here_count <= kKept;
      // The last level's bins have 512 keys.
      if (all || (!whole && room_.here_count <= kKept)) break;
    }
    const uint64 first = all ? 0 : prefix << shift, last = ((prefix + 1) << shift) - 1;
    if (all) base_count_ = base_weight_ = 0;
    gather(first, last);
    return true;
  }

  // Keep the ids with keys first to last, in order; none if they are more than kKept.
  __device__ void gather(uint64 first, uint64 last) {
    __syncthreads();
    if (threadIdx.x == 0) room_.n_kept = 0;
    __syncthreads();
    each_item(first, last, [&](uint64 key) {
      const int at = atomicAdd(&room_.n_kept, 1);
      if (at < kKept) room_.keys[at] = key;
    });
    __syncthreads();
    n_kept_ = room_.n_kept <= kKept ? room_.n_kept : 0;
    put_in_order();
  }

  __device__ void put_in_order() {
    sort(n_kept_);
    for (int i = threadIdx.x; i < kKept; i += kSearchThreads)
      room_.weights[i] = i < n_kept_ ? items_.weight(room_.keys[i]) : 0;
    __syncthreads();
  }

  __device__ bool find_kept(bool by_count, uint64 target, uint64& key, uint64& through) {
    const uint64 base = by_count ? base_count_ : base_weight_;
    if (n_kept_ == 0 || target < base) return false;
    const int at = 2 * threadIdx.x;
    __syncthreads();
    crossing({at < n_kept_ ? 1ull : 0ull, at + 1 < n_kept_ ? 1ull : 0ull},
             {room_.weights[at], room_.weights[at + 1]}, by_count, target - base);
    if (room_.found == kNowhere) return false;
    key = room_.keys[room_.found];
    through = base_weight_ + room_.before_weight + room_.here_weight;
    return true;
  }

  SearchRoom& room_;
  Items& items_;
  const float* logits_;
  int vocab_;
  const uint64* bin_weights_;
  const uint32* bin_counts_;
  int n_kept_ = 0;
  uint64 base_count_ = 0, base_weight_ = 0;  // before the kept
};

// A block a row: the token at `fraction` of the weight that top-k and then top-p leave.
extern "C" __global__ void __launch_bounds__(kSearchThreads, 1)
    sample_draw(const __grid_constant__ SampleParams p) {
  __shared__ SearchRoom room;
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.x;
  const Pick pick = p.picks[row];
  const RowState state = p.states[row];
  if (!draws(pick, state)) return;
  DrawItems items(p, row, pick, state);
  Search<DrawItems> search(room, items, items.row.logits, p.vocab, p, row);
  const KeptIds kept = p.kept[row];
  if (kept.n > 0) search.begin_with(kept, p.kept_keys + static_cast<int64>(row) * kKept);
  uint64 key, mass = kept.mass, through;
  if (kept.by_count) {
    search.find(true, static_cast<uint64>(pick.top_k - 1), false, key, through);
    mass = through;
  }
  if (pick.top_p < 1) {
    search.find(false, top_p_target(pick, mass), false, key, through);
    mass = through;
  }
  search.find(false, draw_target(pick, mass), false, key, through);
  if (threadIdx.x == 0) finish(p, row, static_cast<int>(key & ((1u << kIdBits) - 1)), state.floor);
}

// A block a row: the n_top likeliest.
extern "C" __global__ void __launch_bounds__(kSearchThreads, 1)
    sample_top(const __grid_constant__ SampleParams p) {
  __shared__ SearchRoom room;
  start_successors();
  wait_for_predecessors();
  const int row = blockIdx.x, thread = threadIdx.x;
  const RowState state = p.states[row];
  const bool broken = state.peak < 0;
  TopItems items(p.logits + static_cast<int64>(row) * p.vocab);
  if (!broken) {
    Search<TopItems> search(room, items, items.logits, p.vocab, p, row);
    // The n_top-th of some logits is a bound for all: few are above it, mostly.
    const int mosts = min(p.chunks * kScanWarps, kSearchThreads);
    if (thread < mosts)
      room.keys[thread] =
          items.key(0xFFFFFFFF, p.warp_mosts[static_cast<int64>(row) * p.chunks * kScanWarps + thread]);
    search.sort(mosts);
    uint64 key = p.n_top <= mosts ? room.keys[p.n_top - 1] : ~0ull, through;
    if (!search.keep_up_to(key)) search.find(true, static_cast<uint64>(p.n_top - 1), true, key, through);
  }
  if (thread >= p.n_top) return;
  const int id = broken ? -1 : static_cast<int>(room.keys[thread] & 0xFFFFFFFF);
  const int64 at = static_cast<int64>(row) * p.n_top + thread;
  p.top_tokens[at] = id;
  p.top_logprobs[at] =
      broken ? __int_as_float(0x7FC00000) : static_cast<float>(items.logits[id] - state.floor);
}

}  // namespace qvl::cuda
