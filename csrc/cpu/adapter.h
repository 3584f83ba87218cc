// Low-rank adapters (LoRA) on the CPU: y += scale * B * (A * x).
#pragma once

#include <vector>

#include "core/backend.h"
#include "cpu/linear.h"

namespace qvl::cpu {

// Update of one target matrix. If the adapter does not change that matrix, a.values is NULL.
struct LowRank {
  Matrix a;  // [rank, in]
  Matrix b;  // [out, rank padded with zeros to whole vectors of the ISA]
  float scale = 0;
};

class CpuAdapter final : public Adapter {
 public:
  // The matrices are copied.
  CpuAdapter(const Kernels& kernels, int layers, const std::vector<AdapterMatrix>& matrices);

  // Update of target `index` (core/adapter.h); NULL if the adapter does not change that matrix.
  const LowRank* target(int64_t index) const {
    const LowRank& found = targets_[size(index)];
    return found.a.values != nullptr ? &found : nullptr;
  }

 private:
  // Copy a matrix [rows, columns], padding its rows with zeros to `width`.
  Matrix copy(qvl_dtype dtype, int64_t rows, int64_t columns, int64_t width, const void* values);

  std::vector<LowRank> targets_;
  std::vector<Buffer> memory_;
};

// Consecutive rows of activations with the same adapter; rows without an adapter are in no AdapterRows.
// Either all are computed as rows of prompts (decode false), or all as rows of decode steps.
struct AdapterRows {
  const CpuAdapter* adapter;
  int64_t first;
  int64_t n;
  bool decode;
};

// Add the updates of the adapters to y, which linear() has set to, or increased by, the product W x of the
// target matrix.
void add_low_rank(Context& context, const std::vector<AdapterRows>& runs, int64_t target, const float* x,
                  int64_t x_stride, float* y, int64_t y_stride, Buffer& scratch);

}  // namespace qvl::cpu
