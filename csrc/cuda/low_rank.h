// Low-rank adapters (LoRA) on the GPU: y += scale * B (A x).
#pragma once

#include <vector>

#include "core/backend.h"
#include "cuda/kernels/low_rank.h"
#include "cuda/memory.h"
#include "cuda/ops.h"

namespace qvl::cuda {

// Products of a layer: w1 and w2 are one product, with interleaved rows. Index of a product of a model:
// kLayerProducts * layer + LayerProduct; lm_head has the index kLayerProducts * layers.
enum LayerProduct { kAttnProduct, kAttnProjProduct, kGateUpProduct, kMlpProjProduct, kLayerProducts };

// A and B of a product, with the scale multiplied into B. Their values are NULL if the adapter does not
// change the product.
struct LowRank {
  Matrix a;       // [rank, in], both multiples of 8
  Matrix b;       // [out, rank]
  int parts = 1;  // number of interleaved matrices; row i of `b` belongs to matrix i % parts
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

  // A and B of a product; NULL if the adapter does not change it.
  const LowRank* product(int index) const {
    const LowRank& found = products_[to_size(index)];
    return found.a.values != nullptr ? &found : nullptr;
  }

  // Address in device memory of the adapter's table, which has a LowRankEntry per product.
  uint64_t table() const { return address(table_.get()); }
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

// Decode rows and their adapters; the arrays are in device memory. Kernels read the arrays before their
// predecessors have ended, under the same condition as `metadata` of attention_step in ops.h.
struct AdaptedRows {
  const uint64_t* adapters;  // [n]: addresses of adapter tables; 0: no adapter
  const int32_t* order;      // [n]: row indices sorted by adapter, or NULL
  int n;                     // number of rows
  int product;               // index of the product
};

// low = A x, for each row with its adapter: x H [n, x_stride], of which `in` values per row are used -> H [n,
// low_stride]. Rows without an adapter are not written. low_rank_params() is separate from low_rank_down()
// because linear_decode takes the parameters too: on Hopper its kernel also computes `low`.
LowRankParams low_rank_params(const AdaptedRows&, const void* x, int64_t x_stride, int in, void* low,
                              int low_stride);
void low_rank_down(const Gpu&, CUstream, const LowRankParams&);

// y = epilogue(raw + B low), for each row with its adapter. raw: float32 [n, out], W x; with kAdd and kFloat
// it is NULL, and B low is added to y.
void low_rank_up(const Gpu&, CUstream, const AdaptedRows&, const void* low, int low_stride, int out,
                 const float* raw, Epilogue epilogue, void* y);

// y = epilogue(raw); raw: float32 [n, out].
void finish_raw(const Gpu&, CUstream, const float* raw, int n, int out, Epilogue epilogue, void* y);

}  // namespace qvl::cuda
