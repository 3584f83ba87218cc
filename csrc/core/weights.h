// Weights that a config requires, and the check of the given tensors against them.
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
  bool product;  // an [out, in] matrix of a product, which may be quantised
};

std::vector<WeightSpec> weight_specs(const qvl_config& config);

using WeightTable = std::unordered_map<std::string, qvl_tensor>;

// Check the tensors that the config requires. The result has an entry for each spec, and for the orders of
// inputs (NAME.order) that are given.
WeightTable checked_weights(const qvl_config& config, const Tensors& tensors);

// Bytes of a tensor of a valid dtype; 0 if that dtype cannot store the shape or the sizes are out of range.
uint64_t stored_bytes(qvl_dtype dtype, const std::vector<int64_t>& shape);

const char* dtype_name(qvl_dtype dtype);

}  // namespace qvl
