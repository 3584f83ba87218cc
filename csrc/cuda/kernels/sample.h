// Parameters and scratch memory of the kernels in sample.cu, for host and device.
#pragma once

#include "cuda/kernels/pick.h"

namespace qvl::cuda {

constexpr int kScanThreads = 256;
constexpr int kScanVectors = 4;                              // float4 per thread
constexpr int kScanChunk = 4 * kScanVectors * kScanThreads;  // logits per block of sample_scan
constexpr int kSearchThreads = 1024;
constexpr int kSearchBins = 2048;  // per level of a search
constexpr int kMaxKept = 2048;     // maximum number of ids that a search sorts
constexpr int kScanWarps = kScanThreads / 32;

// Summary of a chunk of a row.
struct ChunkPeak {
  double best;  // the largest logit after penalties and forbidden ids
  int id;       // the lowest id with that logit
  int flags;    // kHasFinite: a finite logit; kHasInvalid: a NaN or positive infinity
  // Only with want_log_sum, of the unchanged logits: the maximum, and the sum of exp(logit - maximum).
  float maximum, sum;
};

// State of a row for the kernels after the scan. log_sum is set only with want_log_sum.
struct RowState {
  double best;     // as in ChunkPeak
  double log_sum;  // log of the sum of exp(logit): a log-probability is logit - log_sum, without penalties
  int peak;        // id of `best`; -1 if the row has a NaN, a positive infinity or no finite value
};

// The ids of a row are ordered by their keys, most likely first; ids with the same upper 11 bits of the key
// form a bin, and the weight of an id is an integer proportional to its probability (sample.cu). A search
// finds the id at which the running count or weight of the ids, in this order, exceeds a value.
//
// Kept ids of a row that draws. sample_draw searches up to three times (top-k, top-p, the draw), and each
// search ends at or before the end of the previous one. Kept are the ids of the bin in which the first search
// ends and, if other searches follow, all ids before this bin.
struct KeptIds {
  unsigned blocks_done;                        // number of finished blocks of sample_bins
  bool by_count;                               // the first search is by count: top-k applies
  bool too_many;                               // more than kMaxKept: none are kept, sample_draw reads logits
  int n;                                       // number of kept ids
  unsigned long long mass;                     // total weight of the row's ids
  unsigned long long base_count, base_weight;  // number and weight of the ids before the kept ones
  unsigned long long first_key, last_key;      // range of the kept keys
};

struct SampleParams {
  const float* logits;         // [n, vocab]
  const Pick* picks;           // [n]
  const int* forbidden;        // ids; a Pick has the range of its row
  int vocab, chunks;           // chunks of kScanChunk logits per row
  int bin_vectors;             // float4 per thread of sample_bins and sample_keep
  bool any_draw, any_changed;  // at least one row: is not greedy; has token counts or forbidden ids
  bool want_log_sum;           // log-probabilities are requested
  int weight_shift;  // weight 1 is the integer 2^(31 + weight_shift), so that the sum of a row is below 2^63

  // Scratch memory.
  ChunkPeak* peaks;                 // [n, chunks]
  RowState* states;                 // [n]
  unsigned long long* bin_weights;  // [n, kSearchBins]
  unsigned int* bin_counts;         // [n, kSearchBins]
  KeptIds* kept;                    // [n]
  unsigned long long* kept_keys;    // [n, kMaxKept]
  float* warp_maxima;               // [n, chunks * kScanWarps]: the largest logit of each warp of the scan
  unsigned int* marks;              // [n, mark_words]: one bit per id, set if it is forbidden
  int mark_words;

  // Outputs, as SampleOutputs in ops.h.
  int* tokens;
  float* logprobs;
  int n_top;
  int* top_tokens;
  float* top_logprobs;
};

}  // namespace qvl::cuda
