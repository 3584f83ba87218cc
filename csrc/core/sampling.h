// Sampling rules shared by all devices (qvl_sampling in qwenvl.h).
#pragma once

#include <cstdint>

#include "qwenvl.h"

namespace qvl {

// Random number in [0, 1) for draw `counter` of this seed: splitmix64 (qvl_sampling in qwenvl.h). The sampler
// of the portable graph, runtime/sampling.py, computes the same.
inline double random_fraction(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + (counter + 1) * 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

inline bool penalised(const qvl_sampling& s) {
  return s.repetition_penalty != 1 || s.frequency_penalty != 0 || s.presence_penalty != 0;
}

inline bool greedy(const qvl_sampling& s) {
  return s.temperature == 0 || s.top_p == 0 || s.top_k == 1;
}

// Maximum number of most likely tokens to return for a row; cuda/kernels/sample_search.cuh relies on it.
constexpr int kMaxLogprobs = 64;

}  // namespace qvl
