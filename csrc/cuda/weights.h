// Upload of a model's weights, which are already checked, to the GPU in the layout of the kernels.
#pragma once

#include <deque>
#include <string>

#include "core/weights.h"
#include "cuda/memory.h"
#include "cuda/ops.h"
#include "cuda/upload.h"

namespace qvl::cuda {

// Parameters of a LayerNorm.
struct Norm {
  const float* weight;
  const float* bias;
};

class Weights {
 public:
  // Throws QVL_NO_MEMORY if a lower bound of the weights' size exceeds the free GPU memory. The functions
  // below throw it, too, if an allocation fails.
  Weights(const Gpu& gpu, CUstream stream, const WeightTable& table);

  // Tensor of any shape as float32 on the GPU.
  const float* floats(const std::string& name);

  // Matrix with its input order (Matrix::order), if it has one; throws QVL_UNSUPPORTED if a matrix of the
  // vision stage has one. `bias`: name of a tensor, or empty. A matrix that is on the GPU already, in H (the
  // compute type) and in rows of a multiple of 8 values, is not copied, and must outlive the result.
  Matrix matrix(const std::string& name, const std::string& bias = "");
  Matrix linear(const std::string& name) { return matrix(name + ".weight", name + ".bias"); }

  // Interleave two matrices of the same shape: row i of the first becomes row 2 i, row i of the second row
  // 2 i + 1. The result is padded with rows of zeros to a multiple of 16 rows. Throws QVL_UNSUPPORTED if the
  // storage types or input orders differ.
  Matrix interleaved(const std::string& first, const std::string& second);

  // As matrix(), but a quantized tensor is dequantized on the host, so that the result is kHalf, of which any
  // rows can be used as a matrix. A quantized tensor must be in host memory and have no input order.
  Matrix half_matrix(const std::string& name, const std::string& bias);

  Norm norm(const std::string& name) { return {floats(name + ".weight"), floats(name + ".bias")}; }

  Uploader& uploader() { return uploader_; }

  // Wait for the uploads and return the memory of the weights.
  std::deque<DeviceMemory> finish();

 private:
  void check_memory() const;
  // Input order of the matrix `name`, as a tensor of the table and as a copy on the GPU; NULL if the matrix
  // has none.
  const qvl_tensor* order_of(const std::string& name) const;
  const int32_t* order(const std::string& name);
  Matrix allocate_matrix(Storage storage, int64_t out, int64_t in);
  // Write row r of the tensor to row first + r * step of `to`, in the layout of the kernels.
  void write_rows(const qvl_tensor& tensor, const Matrix& to, int first, int step);
  void copy_to_gpu(void* to, const void* from, uint64_t bytes, qvl_device source);
  // Allocate GPU memory for weights; small allocations share a slab.
  void* suballocate(uint64_t bytes);

  const Gpu& gpu_;
  CUstream stream_;
  const WeightTable& table_;
  Uploader uploader_;
  DeviceMemory staging_;  // a tensor in the layout of the file, to be converted on the GPU
  std::deque<DeviceMemory> memory_;
  char* slab_ = nullptr;    // unused part of the last slab in memory_
  uint64_t slab_left_ = 0;  // its size in bytes
};

}  // namespace qvl::cuda
