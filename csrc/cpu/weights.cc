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
  Matrix matrix = Matrix::stored(tensor.dtype, tensor.shape[0], k, tensor.data);
  if (!bias.empty()) matrix.bias = floats(bias);
  const auto order = table_.find(name + ".order");
  if (order != table_.end()) matrix.order = static_cast<const int32_t*>(order->second.data);
  return matrix;
}

}  // namespace qvl::cpu
