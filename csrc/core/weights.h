// The weights a config asks for, and the check of those that were given.
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

// Check the tensors that the config asks for. Every spec has its entry in the result.
WeightTable checked_weights(const qvl_config& config, const Tensors& tensors);

// Bytes of a tensor of a valid dtype; 0 if that dtype cannot store the shape or the sizes are absurd.
uint64_t stored_bytes(qvl_dtype dtype, const std::vector<int64_t>& shape);

const char* dtype_name(qvl_dtype dtype);

}  // namespace qvl
