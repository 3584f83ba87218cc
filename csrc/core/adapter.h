// Low-rank adapters (LoRA): the matrices that they may change, and the check of the given ones.
#pragma once

#include <cstdint>
#include <vector>

#include "qwenvl.h"

namespace qvl {

// Targets are numbered: layer * kLayerTargets + one of these, then lm_head.
enum LayerTarget { kAttn, kAttnProj, kW1, kW2, kMlpProj, kLayerTargets };

// Target `target` of a checked adapter: y += scale * b [out, rank] (a [rank, in] x). a and b are the caller's
// memory.
struct AdapterMatrix {
  int64_t target;
  qvl_dtype dtype;  // float32, bfloat16 or float16
  int64_t out, in, rank;
  const void* a;
  const void* b;
  float scale;
};

// Check names, types, shapes and values.
std::vector<AdapterMatrix> checked_adapter(const qvl_config& config, const qvl_adapter_matrix* matrices,
                                           int64_t n);

}  // namespace qvl
