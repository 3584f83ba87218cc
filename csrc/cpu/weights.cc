#include "cpu/weights.h"

#include "core/pack.h"

namespace qvl::cpu {

const float* Weights::floats(const std::string& name) {
  const qvl_tensor& tensor = table_.at(name);
  int64_t n = 1;
  for (int i = 0; i < tensor.n_dims; ++i) n *= tensor.shape[i];
  copies_.push_back(std::unique_ptr<float[]>(new float[static_cast<size_t>(n)]));
  unpack(tensor.dtype, 1, n, tensor.data, copies_.back().get());
  return copies_.back().get();
}

Matrix Weights::matrix(const std::string& name, const std::string& bias) {
  const qvl_tensor& tensor = table_.at(name);
  int64_t k = 1;
  for (int i = 1; i < tensor.n_dims; ++i) k *= tensor.shape[i];
  Matrix matrix;
  matrix.values = tensor.data;
  matrix.dtype = tensor.dtype;
  matrix.rows = tensor.shape[0];
  matrix.k = static_cast<int>(k);
  if (is_quantised(tensor.dtype)) {
    matrix.scales = static_cast<const char*>(tensor.data) + value_bytes(tensor.dtype, matrix.rows, k);
  }
  if (!bias.empty()) matrix.bias = floats(bias);
  return matrix;
}

}  // namespace qvl::cpu
