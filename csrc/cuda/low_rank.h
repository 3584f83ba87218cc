// Low-rank adapters (LoRA) on the GPU: y += scale * B (A x).
#pragma once

#include <vector>

#include "core/backend.h"
#include "cuda/kernels/low_rank.h"
#include "cuda/memory.h"
#include "cuda/ops.h"

namespace qvl::cuda {

// Products of a layer, as the language model runs them: w1 and w2 are one. lm_head is number layers *
// kLayerProducts.
enum LayerProduct { kAttnProduct, kAttnProjProduct, kGateUpProduct, kMlpProjProduct, kLayerProducts };

// A and B of a product, with the scale in B; without values if the adapter does not change it.
struct LowRank {
  Matrix a;       // [rank, in], a multiple of 8 each
  Matrix b;       // [out, rank]
  int parts = 1;  // interleaved matrices: row i of b has values of the matrix i % parts alone
};

class CudaAdapter final : public Adapter {
 public:
  // Copies the matrices. `widths`: [out, in] of the products of a layer and of lm_head, as they run, each a
  // multiple of 8 or, of lm_head, any out.
  struct Shape {
    int out, in;
  };
  CudaAdapter(const Gpu& gpu, CUstream stream, int layers, const std::vector<Shape>& shapes,
              const std::vector<AdapterMatrix>& matrices);
  ~CudaAdapter() override;

  // NULL if the adapter does not change the product.
  const LowRank* product(int index) const {
    const LowRank& found = products_[size(index)];
    return found.a.values != nullptr ? &found : nullptr;
  }

  // Device memory: a LowRankEntry for each product.
  uint64_t table() const { return address(table_.get()); }
  int max_rank() const { return max_rank_; }

 private:
  // A part of a product: row i of B becomes row first + i * step.
  struct Part {
    const AdapterMatrix* matrix;
    int first, step;
  };
  void fill(CUstream stream, LowRank& to, const Shape& shape, const std::vector<Part>& parts);
  Matrix put(CUstream stream, const std::vector<float>& values, int rows, int columns);

  const Gpu& gpu_;
  std::vector<LowRank> products_;
  std::vector<DeviceMemory> memory_;
  DeviceMemory table_;
  int max_rank_ = 0;
};

// Decode rows and their adapters, in device memory, read before the preceding kernels have ended, as `places`
// of attention_step.
struct AdaptedRows {
  const uint64_t* adapters;  // [n]: addresses of tables, 0: no adapter
  const int32_t* order;      // [n]: the rows with those of an adapter together, or NULL
  int n, product;
};

// low = A x: x H [n, x_stride], `in` values of a row -> H [n, low_stride]; rows without an adapter are not
// written.
LowRankParams low_rank_params(const AdaptedRows&, const void* x, int64_t x_stride, int in, void* low,
                              int low_stride);
void low_rank_down(const Gpu&, CUstream, const LowRankParams&);

// The epilogue `into` of raw + B low: raw float32 [n, out] -> y. kAdd and kFloat: raw NULL, added to y.
void low_rank_up(const Gpu&, CUstream, const AdaptedRows&, const void* low, int low_stride, int out,
                 const float* raw, Into into, void* y);

// The epilogue of raw float32 [n, out] -> y.
void finish_raw(const Gpu&, CUstream, const float* raw, int n, int out, Into into, void* y);

}  // namespace qvl::cuda
