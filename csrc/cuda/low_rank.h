// Low-rank adapters (LoRA) on the GPU: y += scale * B (A x).
#pragma once

#include <vector>

#include "core/backend.h"
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

// y float32 [n, out] = B (A x) for decode rows, zeros for rows without an adapter. adapters: [n] addresses of
// tables; order: [n], the rows with those of an adapter together, or NULL; low: scratch, H [n,
// low_stride]. `adapters`, `order` and the matrices are read before the preceding kernels have ended, as
// `places` of attention_step.
void low_rank_decode(const Gpu&, CUstream, const uint64_t* adapters, const int32_t* order, int product,
                     const void* x, int64_t x_stride, int in, int n, void* low, int low_stride, int out,
                     float* y);

}  // namespace qvl::cuda
