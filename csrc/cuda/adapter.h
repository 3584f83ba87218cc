// A LoRA adapter on the GPU: the matrices A and B of y += scale * B (A x).
#pragma once

#include <vector>

#include "core/backend.h"
#include "cuda/memory.h"
#include "cuda/ops.h"

namespace qvl::cuda {

// Products of a layer: w1 and w2 are one product, with interleaved rows. Index of a product of a model:
// kLayerProducts * layer + LayerProduct; lm_head has the index kLayerProducts * layers.
enum LayerProduct { kAttnProduct, kAttnProjProduct, kGateUpProduct, kMlpProjProduct, kLayerProducts };

// A and B of a product, with the scale multiplied into B. Their values are NULL if the adapter does not
// change the product.
struct LowRank {
  Matrix a;  // [rank, in], both multiples of 8; for w1 and w2 the rows of both matrices A
  Matrix b;  // [out, rank]
  // Number of interleaved matrices. Row i of `b` belongs to matrix i % parts, and is zero in the columns of
  // the other matrix's A.
  int parts = 1;
};

class CudaAdapter final : public Adapter {
 public:
  struct Shape {
    int out, in;
  };
  // shapes: of the products of a layer, in the order of LayerProduct, then of lm_head; `out` and `in` are
  // multiples of 8, except `out` of lm_head. matrices: checked, in host memory.
  CudaAdapter(const Gpu& gpu, CUstream stream, int layers, const std::vector<Shape>& shapes,
              const std::vector<AdapterMatrix>& matrices);
  ~CudaAdapter() override;

  // For prompt rows: A and B of a product; NULL if the adapter does not change it.
  const LowRank* product(int index) const {
    const LowRank& found = products_[to_size(index)];
    return found.a.values != nullptr ? &found : nullptr;
  }

  // For decode rows: address in device memory of the adapter's table, which has a LowRankEntry per product.
  uint64_t table() const { return address(table_.get()); }
  // Highest rank of LowRank::a of all products.
  int max_rank() const { return max_rank_; }

 private:
  // The update of one of the one or two weight matrices of a product: row i of its B becomes row
  // first + i * step of the product's B. matrix: NULL if the adapter lacks it.
  struct Part {
    const AdapterMatrix* matrix;
    int first, step;
  };
  void upload_product(CUstream stream, LowRank& to, const Shape& shape, const std::vector<Part>& parts);
  // Copy a matrix to the GPU as H.
  Matrix upload(CUstream stream, const std::vector<float>& values, int rows, int columns);

  const Gpu& gpu_;
  std::vector<LowRank> products_;
  std::vector<DeviceMemory> memory_;
  DeviceMemory table_;
  int max_rank_ = 0;
};

}  // namespace qvl::cuda
