// Checked weights in the form used by the CPU back end.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/weights.h"
#include "cpu/linear.h"

namespace qvl::cpu {

struct Norm {
  const float* weight;
  const float* bias;  // NULL: RMSNorm
};

class Weights {
 public:
  Weights(const WeightTable& table) : table_(table) {}

  // float32 copy of a tensor, owned by this object until take_copies().
  const float* floats(const std::string& name);

  // Matrix in place; `bias` may be empty.
  Matrix matrix(const std::string& name, const std::string& bias = "");

  // name.weight and name.bias
  Matrix linear(const std::string& name) { return matrix(name + ".weight", name + ".bias"); }

  // name.weight and name.bias as float32.
  Norm norm(const std::string& name) { return {floats(name + ".weight"), floats(name + ".bias")}; }

  // Move the copies to the caller; must be the last call.
  std::vector<std::unique_ptr<float[]>> take_copies() { return std::move(copies_); }

 private:
  const WeightTable& table_;
  std::vector<std::unique_ptr<float[]>> copies_;
};

}  // namespace qvl::cpu
