// Checked weights in the form used by the CPU back end.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/weights.h"
#include "cpu/linear.h"

namespace qvl::cpu {

// Weight and bias of a LayerNorm.
struct Norm {
  const float* weight;
  const float* bias;
};

// The weights of an engine by name. The table, of checked_weights(), has the named weights and outlives this
// object. matrix() refers to the memory of the table's tensors, the caller's or a mapped parameter file; its
// bias and floats() are copies.
class Weights {
 public:
  Weights(const WeightTable& table) : table_(table) {}

  // float32 copy of a tensor; this object owns it until take_copies().
  const float* floats(const std::string& name);

  // Matrix with its column order (tensor name.order), if it has one, and with the tensor named by `bias` as
  // its bias, unless `bias` is empty.
  Matrix matrix(const std::string& name, const std::string& bias = "");

  // Matrix name.weight with bias name.bias.
  Matrix linear(const std::string& name) { return matrix(name + ".weight", name + ".bias"); }

  // LayerNorm with name.weight and name.bias.
  Norm norm(const std::string& name) { return {floats(name + ".weight"), floats(name + ".bias")}; }

  // Transfer the ownership of the copies to the caller; must be the last call.
  std::vector<std::unique_ptr<float[]>> take_copies() { return std::move(copies_); }

 private:
  const WeightTable& table_;
  std::vector<std::unique_ptr<float[]>> copies_;
};

}  // namespace qvl::cpu
