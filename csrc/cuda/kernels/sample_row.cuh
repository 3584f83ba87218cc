// A row of logits with its penalties and forbidden ids, and its distribution over threads.
//
// Layout: logits float32 [vocab]; counts int32 [vocab]; marks: one bit per id, set if it is forbidden. A
// thread reads kVectors float4, 4 * threads logits apart, here with 256 threads:
//
//   logits   | t0: 4 | t1: 4 | .. | t255: 4 | t0: 4 | ..
//
// Cost: 4 bytes per logit, 4 more if the row has penalties, which need token counts; a few
// double-precision operations per changed logit.
//
// Reference: `expected` in tests/cuda/test_sample.py, the same rules in NumPy with float64.
#pragma once

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/sample.h"

namespace qvl::cuda {

constexpr double kForbidden = -1e10;  // logit of a forbidden id

__device__ inline float infinity() {
  return __int_as_float(0x7F800000);
}

// A row's logits after penalties and forbidden ids.
struct Row {
  const float* logits;
  const int* counts;     // NULL without penalties
  const uint32* marks;   // NULL without forbidden ids; bit 0 is id first_marked
  int first_marked = 0;  // sample.cu sets it and `marks` to a chunk of the row
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

  // Whether the row has penalties or forbidden ids.
  __device__ bool changed() const { return counts != nullptr || marks != nullptr; }

  // Logit of an id: `logit`, or kForbidden if the id is forbidden, changed by the penalties. Each operation
  // is rounded, as on the CPU (no fused multiply-adds).
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

// Load a thread's logits: kVectors float4 from `first` on, 4 * threads logits apart; -infinity beyond the
// row.
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

}  // namespace qvl::cuda
