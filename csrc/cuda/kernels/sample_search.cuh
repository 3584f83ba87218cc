// Ordering of a row's ids, and search for the points where running sums cross a value: top-k, top-p, the
// draw.
//
// Layout of a key, 64 bits; a smaller key is a likelier id:
//
//   DrawItems: draws               | 40 bits: (largest logit - logit) / temperature, in 2^-35 | 24 bits: id |
//   TopItems: most likely tokens   | 32 bits: the logit, in reversed order                    | 32 bits: id |
//
//   level 1: 2048 bins of the upper 11 bits    | w0 | w1 | w2 | ..      the bin where the running sum crosses
//   level 2: 2048 bins of the next 11 bits          \_ | | | ..         and so on, until at most kMaxKept
//                                                                       ids are left, which are sorted
//
// Weights are integers, so that sums do not depend on the order of additions.
//
// Cost of keep(): a pass over the row, 4 * vocab bytes from the L2 cache, per level whose bins are filled
// here (for draws sample_bins has filled those of level 1), and another in gather(), which collects the ids
// to sort. Then, as in begin_with(), whose ids are already collected, a bitonic sort of up to 2048 keys in
// shared memory, with 66 rounds of comparisons for 2048.
//
// Reference: `expected` in tests/cuda/test_sample.py; sample.cu describes the whole algorithm.
#pragma once

#include "cuda/kernels/sample_row.cuh"

namespace qvl::cuda {

constexpr int kIdBits = 24, kStepBits = 35;       // parts of a key for draws
constexpr uint64 kFarthest = 32ull << kStepBits;  // a distance of 32, in steps; smaller ones fit 40 bits
constexpr uint64 kLog2E = 6653256548922161246;    // log2(e) * 2^62

// Range of logits that includes the logits of a range of keys.
struct LogitRange {
  float low, high;  // NaN: unbounded, as TopItems::logit_of() gives for the first and the last possible key

  __device__ bool contains(float logit) const { return !(logit < low || logit > high); }
};

// The ids of a row with their weights, from the most to the least likely after penalties and forbidden ids:
// the order for top-k, top-p and the draw.
struct DrawItems : LogitRange {
  static constexpr bool kHasFirstBins = true;  // sample_bins has filled the bins of level 1
  Row row;
  double best;       // the largest logit after penalties and forbidden ids
  double steps;      // number of steps of 2^-35 in a difference of 1 between logits
  int weight_shift;  // see SampleParams

  __device__ DrawItems(const SampleParams& p, int number, const Pick& pick, const RowState& state)
      : row(p, number),
        best(state.best),
        steps((1ull << kStepBits) / static_cast<double>(pick.temperature)),
        weight_shift(p.weight_shift) {}

  // Weight exp(-distance) of a key in units of 2^-(31 + weight_shift), computed with a relative error of a
  // few 1e-7 and rounded down to an integer. It is 2^-t, where t is the distance times log2(e).
  __device__ uint64 weight(uint64 key) const {
    const uint64 t = __umul64hi(key >> kIdBits << 24, kLog2E);  // in steps of 2^-57
    const float part = static_cast<float>(static_cast<uint32>(t >> 25)) * 0x1p-32f;
    const uint64 mantissa = static_cast<uint64>(exp2f(-part) * 0x1p31f);
    return mantissa << weight_shift >> (t >> 57);
  }

  // Set the range of logits so that it includes those of the keys first to last. For a row with penalties or
  // forbidden ids it is infinite, since logits before these changes do not bound the keys.
  __device__ void narrow(uint64 first, uint64 last) {
    low = -infinity();
    high = infinity();
    if (row.changed()) return;
    const double from = (first >> kIdBits) / steps, to = ((last >> kIdBits) + 1) / steps;
    const double slack = 1e-6 * (fabs(best) + to);  // more than the rounding errors
    high = static_cast<float>(best - from + slack);
    low = static_cast<float>(best - to - slack);
  }

  // Set `key` to the key of an id; return false if its distance is at least 32: such an id counts as one of
  // weight 0 and is never drawn.
  __device__ bool get_key(int id, float logit, uint64& key) const {
    const double distance = (best - row.value(id, logit)) * steps;
    if (!(distance < static_cast<double>(kFarthest))) return false;
    key = __double2ull_rd(distance) << kIdBits | static_cast<uint32>(id);
    return true;
  }
};

// The ids of a row in the order of its logits before penalties and forbidden ids. They are searched by count
// only: all weights are 0.
struct TopItems : LogitRange {
  static constexpr bool kHasFirstBins = false;
  const float* logits;

  __device__ explicit TopItems(const float* logits) : logits(logits) {}

  // Upper half of a key: integers in the reversed order of the logits.
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
  __device__ bool get_key(int id, float logit, uint64& key_) const {
    key_ = key(static_cast<uint32>(id), logit);
    return true;
  }
};

// Weights and counts of the ids of each bin, in shared memory. A weight has two 32-bit words: the compiler
// implements 64-bit atomic additions to shared memory as loops.
struct Bins {
  uint32 low[kSearchBins], high[kSearchBins], counts[kSearchBins];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kSearchBins; i += blockDim.x) low[i] = high[i] = counts[i] = 0;
    __syncthreads();
  }
  __device__ void add(int bin, uint64 weight) {
    atomicAdd(counts + bin, 1);
    const auto low_word = static_cast<uint32>(weight);
    uint32 high_word = static_cast<uint32>(weight >> 32);
    if (low_word != 0 && atomicAdd(low + bin, low_word) + low_word < low_word) ++high_word;  // carry
    if (high_word != 0) atomicAdd(high + bin, high_word);
  }
  __device__ uint64 weight(int bin) const { return static_cast<uint64>(high[bin]) << 32 | low[bin]; }
};

constexpr int kBinShift = 53;  // level 1: key >> 53 are the upper 11 bits of a key

// Exclusive prefix sum over the threads of a block of kWarps warps; `all` is set to the total. scratch:
// kWarps numbers in shared memory.
template <int kWarps>
__device__ uint64 sum_before(uint64 value, uint64* scratch, uint64& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64 sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64 other = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  uint64 warps = lane < kWarps ? scratch[lane] : 0;
  for (int distance = 1; distance < kWarps; distance *= 2) {
    const uint64 other = __shfl_up_sync(0xFFFFFFFFu, warps, distance);
    if (lane >= distance) warps += other;
  }
  all = __shfl_sync(0xFFFFFFFFu, warps, kWarps - 1);
  const uint64 before = __shfl_sync(0xFFFFFFFFu, warps, warp == 0 ? 0 : warp - 1);
  return sum - value + (warp == 0 ? 0 : before);
}

constexpr int kNotFound = -1;

struct SearchScratch {
  union {
    Bins bins;
    uint64 weights[kMaxKept];  // of the kept ids
  };
  uint64 keys[kMaxKept];
  uint64 sums[2][32];
  // Results of find_crossing(): sums before the found index, count and weight at this index, and the index
  // itself or kNotFound.
  uint64 before_count, before_weight;
  uint64 found_count, found_weight;
  int found;
  int n_kept;
};

// Search for the id at which a running sum over a row crosses a value. Called by all threads of a block of
// kSearchThreads with the same arguments.
template <typename Items>
class Search {
 public:
  __device__ Search(SearchScratch& scratch, Items& items, const float* logits, int vocab,
                    const SampleParams& p, int row)
      : scratch_(scratch), items_(items), logits_(logits), vocab_(vocab) {
    bin_weights_ = p.bin_weights + static_cast<int64>(row) * kSearchBins;
    bin_counts_ = p.bin_counts + static_cast<int64>(row) * kSearchBins;
  }

  // Start with the ids gathered by sample_keep.
  __device__ void begin_with(const KeptIds& kept, const uint64* keys) {
    n_kept_ = kept.n;
    base_count_ = kept.base_count;
    base_weight_ = kept.base_weight;
    for (int i = threadIdx.x; i < n_kept_; i += kSearchThreads) scratch_.keys[i] = keys[i];
    sort_kept();
  }

  // Keep the ids with keys up to `last`; return false if there are more than kMaxKept.
  __device__ bool keep_up_to(uint64 last) {
    base_count_ = base_weight_ = 0;
    gather(0, last);
    return n_kept_ > 0;
  }

  // Bitonic sort of the first n keys: rounds of comparisons of keys a power of two apart. A warp has 64
  // adjacent keys, so that rounds with distances up to 32 need no barrier of the block.
  __device__ void sort(int n) {
    int padded_n = 2;
    while (padded_n < n) padded_n *= 2;
    for (int i = n + threadIdx.x; i < padded_n; i += kSearchThreads) scratch_.keys[i] = ~0ull;
    __syncthreads();
    const int thread = threadIdx.x;
    for (int run = 2; run <= padded_n; run *= 2) {
      for (int distance = run / 2; distance > 0; distance /= 2) {
        const int i = 2 * thread - (thread & (distance - 1));
        if (thread < padded_n / 2) {
          const uint64 a = scratch_.keys[i], b = scratch_.keys[i + distance];
          if ((a > b) == ((i & run) == 0)) {
            scratch_.keys[i] = b;
            scratch_.keys[i + distance] = a;
          }
        }
        const int next = distance > 1 ? distance / 2 : run;
        if (distance > 32 || next > 32) {
          __syncthreads();
        } else {
          __syncwarp();
        }
      }
    }
    __syncthreads();
  }

  // Find the first id, in order, at which the cumulative count or weight exceeds `target`. Set `key` to its
  // key and `through` to the cumulative weight including it. Return false if the total does not exceed the
  // target. Afterwards a range of ids that includes the found one is kept in scratch memory, sorted.
  // keep_all, only while no ids are kept: the range begins with the first id in the order.
  __device__ bool find(bool by_count, uint64 target, bool keep_all, uint64& key, uint64& through) {
    if (!find_kept(by_count, target, key, through)) {
      if (!keep(by_count, target, keep_all)) return false;
      find_kept(by_count, target, key, through);
    }
    return true;
  }

 private:
  // Call each(key) for the ids of the row with keys first to last.
  template <typename Each>
  __device__ void for_each_item(uint64 first_key, uint64 last_key, Each&& each) {
    constexpr int kVectors = 4;
    items_.narrow(first_key, last_key);
    for (int first = 4 * threadIdx.x; first < vocab_; first += 4 * kVectors * kSearchThreads) {
      float values[kVectors][4];
      load_logits(logits_, vocab_, first, values);
      uint32 candidates = 0;  // one bit per candidate; usually few are set
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int j = 0; j < 4; ++j) candidates |= items_.contains(values[v][j]) ? 1u << (4 * v + j) : 0;
      }
      for (; candidates != 0; candidates &= candidates - 1) {
        const int bit = __ffs(candidates) - 1, id = first + bit / 4 * 4 * kSearchThreads + bit % 4;
        uint64 key;
        if (id < vocab_ && items_.get_key(id, logits_[id], key) && key >= first_key && key <= last_key)
          each(key);
      }
    }
  }

  // Fill the bins with the keys that begin with the bits `prefix`. The next 11 bits of such a key, from bit
  // `shift` on, are the number of its bin.
  __device__ void fill(int shift, uint64 prefix) {
    Bins& bins = scratch_.bins;
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
      for_each_item(first, last, [&](uint64 key) {
        bins.add(static_cast<int>(key >> shift & (kSearchBins - 1)), items_.weight(key));
      });
    }
    __syncthreads();
  }

  // Set `found` to the index (of a bin or of a kept id) at which the running sum exceeds the target, or to
  // kNotFound. Each of the 1024 threads has the counts and weights of two adjacent indices.
  __device__ void find_crossing(const uint64 (&counts)[2], const uint64 (&weights)[2], bool by_count,
                                uint64 target) {
    if (threadIdx.x == 0) scratch_.found = kNotFound;
    uint64 all;
    uint64 count = sum_before<32>(counts[0] + counts[1], scratch_.sums[0], all);
    uint64 weight = sum_before<32>(weights[0] + weights[1], scratch_.sums[1], all);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64 before = by_count ? count : weight, value = by_count ? counts[i] : weights[i];
      if (before <= target && target - before < value) {
        scratch_.found = 2 * threadIdx.x + i;
        scratch_.before_count = count;
        scratch_.before_weight = weight;
        scratch_.found_count = counts[i];
        scratch_.found_weight = weights[i];
      }
      count += counts[i];
      weight += weights[i];
    }
    __syncthreads();
  }

  __device__ void find_crossing_bin(bool by_count, uint64 target) {
    const int at = 2 * threadIdx.x;
    const Bins& bins = scratch_.bins;
    find_crossing({bins.counts[at], bins.counts[at + 1]}, {bins.weight(at), bins.weight(at + 1)}, by_count,
                  target);
  }

  // Keep a sorted range of ids that includes the one at which the running sum exceeds the target; return
  // false if the total does not exceed it. keep_all: as for find().
  __device__ bool keep(bool by_count, uint64 target, bool keep_all) {
    uint64 prefix = 0, remaining = target;
    base_count_ = base_weight_ = 0;
    n_kept_ = 0;
    int shift = kBinShift;
    bool all;  // whether to keep the ids before the bin as well
    for (;; shift -= 11) {
      fill(shift, prefix);
      find_crossing_bin(by_count, remaining);
      if (scratch_.found == kNotFound) return false;
      prefix = prefix * kSearchBins + static_cast<uint64>(scratch_.found);
      remaining -= by_count ? scratch_.before_count : scratch_.before_weight;
      base_count_ += scratch_.before_count;
      base_weight_ += scratch_.before_weight;
      all = base_count_ + scratch_.found_count <= kMaxKept;
      // The loop ends at shift 9 at the latest. A bin then has at most 512 ids. With keep_all (sample_top),
      // at most n_top - 1 ids come before it, fewer than kMaxLogprobs = 64 (core/sampling.h): all are fewer
      // than kMaxKept.
      if (all || (!keep_all && scratch_.found_count <= kMaxKept)) break;
    }
    const uint64 first = all ? 0 : prefix << shift, last = ((prefix + 1) << shift) - 1;
    if (all) base_count_ = base_weight_ = 0;
    gather(first, last);
    return true;
  }

  // Keep the ids with keys first to last, sorted; none if there are more than kMaxKept.
  __device__ void gather(uint64 first, uint64 last) {
    __syncthreads();
    if (threadIdx.x == 0) scratch_.n_kept = 0;
    __syncthreads();
    for_each_item(first, last, [&](uint64 key) {
      const int at = atomicAdd(&scratch_.n_kept, 1);
      if (at < kMaxKept) scratch_.keys[at] = key;
    });
    __syncthreads();
    n_kept_ = scratch_.n_kept <= kMaxKept ? scratch_.n_kept : 0;
    sort_kept();
  }

  // Sort the kept keys and compute their weights.
  __device__ void sort_kept() {
    sort(n_kept_);
    for (int i = threadIdx.x; i < kMaxKept; i += kSearchThreads)
      scratch_.weights[i] = i < n_kept_ ? items_.weight(scratch_.keys[i]) : 0;
    __syncthreads();
  }

  // find() among the kept ids.
  __device__ bool find_kept(bool by_count, uint64 target, uint64& key, uint64& through) {
    const uint64 base = by_count ? base_count_ : base_weight_;
    if (n_kept_ == 0 || target < base) return false;
    const int at = 2 * threadIdx.x;
    __syncthreads();
    find_crossing({at < n_kept_ ? 1ull : 0ull, at + 1 < n_kept_ ? 1ull : 0ull},
                  {scratch_.weights[at], scratch_.weights[at + 1]}, by_count, target - base);
    if (scratch_.found == kNotFound) return false;
    key = scratch_.keys[scratch_.found];
    through = base_weight_ + scratch_.before_weight + scratch_.found_weight;
    return true;
  }

  SearchScratch& scratch_;
  Items& items_;
  const float* logits_;
  int vocab_;
  const uint64* bin_weights_;
  const uint32* bin_counts_;
  int n_kept_ = 0;
  uint64 base_count_ = 0, base_weight_ = 0;  // number and total weight of the ids before the kept ones
};

}  // namespace qvl::cuda
