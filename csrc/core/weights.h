// Weights required by a config, and the check of the given tensors against them.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "core/tensors.h"
#include "qwenvl.h"

namespace qvl {

struct WeightSpec {
  std::string name;
  std::vector<int64_t> shape;
  bool product;  // an [out, in] matrix of a linear layer, which may be quantized
};

std::vector<WeightSpec> weight_specs(const qvl_config& config);

using WeightTable = std::unordered_map<std::string, qvl_tensor>;

// Check the tensors that the config requires. The result has an entry per spec and per given input order
// (NAME.order).
WeightTable checked_weights(const qvl_config& config, const Tensors& tensors);

// Bytes of a tensor; 0 if the dtype cannot store the shape or a size is out of range. dtype must be valid.
uint64_t stored_bytes(qvl_dtype dtype, const std::vector<int64_t>& shape);

const char* dtype_name(qvl_dtype dtype);

}  // namespace qvl
