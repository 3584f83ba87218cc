// The checked weights on the GPU, in the form the kernels use.
#pragma once

#include <deque>
#include <string>

#include "core/weights.h"
#include "cuda/memory.h"
#include "cuda/ops.h"
#include "cuda/upload.h"

namespace qvl::cuda {

struct Norm {
  const float* weight;
  const float* bias;  // NULL: RMSNorm
};

class Weights {
 public:
  // Fails if the GPU has no room for all of them.
  Weights(const Gpu& gpu, CUstream stream, const WeightTable& table);

  // float32, of any shape.
  const float* floats(const std::string& name);

  // `bias` may be empty.
  Matrix matrix(const std::string& name, const std::string& bias = "");
  Matrix linear(const std::string& name) { return matrix(name + ".weight", name + ".bias"); }

  // Row i of the first becomes row 2 i, row i of the second row 2 i + 1; zeros behind, up to a multiple of 16
  // rows.
  Matrix interleaved(const std::string& first, const std::string& second);

  // Values of the type computed in, whatever the tensor is stored as.
  Matrix half_matrix(const std::string& name, const std::string& bias);

  Norm norm(const std::string& name) { return {floats(name + ".weight"), floats(name + ".bias")}; }

  Uploader& uploader() { return uploader_; }

  // What was uploaded; waits until it is there.
  std::deque<DeviceMemory> finish();

 private:
  void check_room() const;
  Matrix empty(Storage storage, int64_t out, int64_t in);
  void fill(const qvl_tensor& tensor, const Matrix& to, int first, int step);
  void put(void* to, const void* from, uint64_t bytes, qvl_device where);
  void* take(uint64_t bytes);

  const Gpu& gpu_;
  CUstream stream_;
  const WeightTable& table_;
  Uploader uploader_;
  DeviceMemory staging_;
  std::deque<DeviceMemory> memory_;
  char* room_ = nullptr;  // what is left of the last of memory_
  uint64_t left_ = 0;
};

}  // namespace qvl::cuda
