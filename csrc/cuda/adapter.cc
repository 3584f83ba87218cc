#include "cuda/adapter.h"

#include <algorithm>

#include "core/pack.h"
#include "cuda/kernels/low_rank.h"

namespace qvl::cuda {
namespace {

constexpr int kVector = 8;  // values of H in 16 bytes, which the kernels load at a time

// The rank, rounded up to whole vectors.
int padded_rank(int64_t rank) {
  return static_cast<int>((rank + kVector - 1) / kVector * kVector);
}

std::vector<float> floats(qvl_dtype dtype, int64_t rows, int64_t columns, const void* values) {
  std::vector<float> unpacked(to_size(rows * columns));
  unpack(dtype, rows, columns, values, unpacked.data());
  return unpacked;
}

}  // namespace

CudaAdapter::CudaAdapter(const Gpu& gpu, CUstream stream, int layers, const std::vector<Shape>& shapes,
                         const std::vector<AdapterMatrix>& matrices)
    : gpu_(gpu), products_(to_size(layers * kLayerProducts + 1)) {
  std::vector<const AdapterMatrix*> targets(to_size(layers * kLayerTargets + 1));
  for (const AdapterMatrix& matrix : matrices) targets[to_size(matrix.target)] = &matrix;
  // Upload the parts whose matrices exist.
  const auto make = [&](int product, const Shape& shape, std::vector<Part> parts) {
    parts.erase(std::remove_if(parts.begin(), parts.end(), [](const Part& p) { return p.matrix == nullptr; }),
                parts.end());
    if (!parts.empty()) upload_product(stream, products_[to_size(product)], shape, parts);
  };
  for (int layer = 0; layer < layers; ++layer) {
    const AdapterMatrix* const* const layer_targets = targets.data() + layer * kLayerTargets;
    const int first = layer * kLayerProducts;
    make(first + kAttnProduct, shapes[kAttnProduct], {{layer_targets[kAttn], 0, 1}});
    make(first + kAttnProjProduct, shapes[kAttnProjProduct], {{layer_targets[kAttnProj], 0, 1}});
    make(first + kGateUpProduct, shapes[kGateUpProduct],
         {{layer_targets[kW1], 0, 2}, {layer_targets[kW2], 1, 2}});
    make(first + kMlpProjProduct, shapes[kMlpProjProduct], {{layer_targets[kMlpProj], 0, 1}});
  }
  make(layers * kLayerProducts, shapes[kLayerProducts], {{targets.back(), 0, 1}});

  std::vector<LowRankEntry> entries;
  for (const LowRank& product : products_)
    entries.push_back({product.a.values, product.b.values, product.a.out, product.parts});
  table_ = DeviceMemory(entries.size() * sizeof(LowRankEntry));
  cuda::copy(stream, table_.get(), entries.data(), table_.bytes());
  check(driver().cuStreamSynchronize(stream), "uploading an adapter");
}

CudaAdapter::~CudaAdapter() {
  const CurrentContext current(gpu_.context());
  memory_.clear();
  table_ = DeviceMemory();
}

// The parts have the same inputs. Their matrices A are stacked as rows; each matrix B gets columns of its
// own, with zeros in the columns of the other part, and its rows are interleaved like those of the base
// matrix. All matrices are padded to the largest rank.
void CudaAdapter::upload_product(CUstream stream, LowRank& to, const Shape& shape,
                                 const std::vector<Part>& parts) {
  to.parts = parts.front().step;
  int width = 0;
  for (const Part& part : parts) width = std::max(width, padded_rank(part.matrix->rank));
  const int rank = width * to.parts;
  max_rank_ = std::max(max_rank_, rank);
  std::vector<float> a(to_size(int64_t{rank} * shape.in)), b(to_size(int64_t{shape.out} * rank));
  for (const Part& part : parts) {
    const AdapterMatrix& m = *part.matrix;
    const int64_t offset = int64_t{part.first} * width;  // of the part: rows of A, columns of B
    const std::vector<float> from_a = floats(m.dtype, m.rank, m.in, m.a),
                             from_b = floats(m.dtype, m.out, m.rank, m.b);
    for (int64_t i = 0; i < m.rank; ++i)
      std::copy_n(from_a.data() + i * m.in, m.in, a.data() + (offset + i) * shape.in);
    for (int64_t i = 0; i < m.out; ++i) {
      float* const row = b.data() + (part.first + i * part.step) * rank + offset;
      for (int64_t j = 0; j < m.rank; ++j) row[j] = m.scale * from_b[to_size(i * m.rank + j)];
    }
  }
  to.a = upload(stream, a, rank, shape.in);
  to.b = upload(stream, b, shape.out, rank);
}

Matrix CudaAdapter::upload(CUstream stream, const std::vector<float>& values, int rows, int columns) {
  const DeviceMemory float_values(values.size() * sizeof(float));
  cuda::copy(stream, float_values.get(), values.data(), float_values.bytes());
  memory_.emplace_back(values.size() * 2);
  to_half(gpu_, stream, float_values.get<float>(), static_cast<int64_t>(values.size()), memory_.back().get());
  check(driver().cuStreamSynchronize(stream), "uploading an adapter");
  Matrix matrix{};
  matrix.storage = Storage::kHalf;
  matrix.out = rows;
  matrix.in = matrix.stride = columns;
  matrix.values = memory_.back().get();
  return matrix;
}

}  // namespace qvl::cuda
