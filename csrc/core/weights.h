// The weights that a config requires, and the check that the given tensors are these weights.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "core/tensors.h"
#include "qwenvl.h"

namespace qvl {

// Required name and shape of a weight.
struct WeightSpec {
  std::string name;
  std::vector<int64_t> shape;
  bool product;  // an [out, in] matrix of a linear layer, or conv1, [out, 3, p, p]: may be quantized
};

std::vector<WeightSpec> weight_specs(const qvl_config& config);

using WeightTable = std::unordered_map<std::string, qvl_tensor>;

// Check the tensors that the config requires; throws QVL_BAD_WEIGHT. The result contains these, and the
// column orders (NAME.order) that were given.
WeightTable checked_weights(const qvl_config& config, const Tensors& tensors);

// Bytes of a tensor; 0 if the dtype is unknown or cannot store the shape, or if the shape is out of range.
uint64_t stored_bytes(qvl_dtype dtype, const std::vector<int64_t>& shape);

const char* dtype_name(qvl_dtype dtype);

}  // namespace qvl
