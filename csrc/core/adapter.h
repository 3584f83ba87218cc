// Low-rank adapters (LoRA): their target matrices, and the check of an adapter's matrices.
#pragma once

#include <cstdint>
#include <vector>

#include "qwenvl.h"

namespace qvl {

// Target matrices of a layer: attn.c_attn, attn.c_proj, mlp.w1, mlp.w2 and mlp.c_proj. The index of a target
// is layer * kLayerTargets + LayerTarget; lm_head has the last index.
enum LayerTarget { kAttn, kAttnProj, kW1, kW2, kMlpProj, kLayerTargets };

// Checked A and B of an adapter for one target: y += scale * b * (a * x), with a [rank, in] and b [out, rank]
// in the caller's memory.
struct AdapterMatrix {
  int64_t target;
  qvl_dtype dtype;  // float32, bfloat16 or float16
  int64_t out, in, rank;
  const void* a;
  const void* b;
  float scale;
};

// Check names, types, shapes and values of an adapter's matrices; return the matrices as AdapterMatrix.
// Throws QVL_BAD_WEIGHT, or QVL_INVALID if a name is NULL or the config has no language stage.
std::vector<AdapterMatrix> checked_adapter(const qvl_config& config, const qvl_adapter_matrix* matrices,
                                           int64_t n);

}  // namespace qvl
