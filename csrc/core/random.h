// The random numbers of qvl_sample; the header says which.
#pragma once

#include <cstdint>

namespace qvl {

// Draw number `counter` with this seed, in [0, 1).
inline double random_fraction(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + (counter + 1) * 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

}  // namespace qvl
