// Parameters of the products of prompts, shared by launchers and kernels; Result also of decode steps on
// Hopper and of adapters. Built-in types only (tensor_map.h). H: the compute type, bfloat16 or float16.
#pragma once

#include "cuda/kernels/tensor_map.h"

namespace qvl::cuda {

// Epilogues: the values of `Epilogue` of ops.h.
constexpr int kEpilogueHalf = 0, kEpilogueFloat = 1, kEpilogueAdd = 2, kEpilogueGelu = 3,
              kEpilogueSiluTimes = 4;

// Destination of a product and its epilogue.
struct Result {
  const float* bias;  // [out], or NULL
  void* y;            // type and shape by the epilogue (ops.h)
  int n, out;         // rows and columns of the product
  int epilogue;       // kEpilogueHalf ..
};

// Parameters of linear_prompt.cu, which Hopper runs only in tests: y [n, out] = x [n, x_stride] W^T,
// W [out, stride], both H; only the first `in` values of a row are used.
struct LinearPrompt {
  Result result;
  const void* x;
  const void* w;
  long long x_stride;
  int in, stride;
};

// Dequantization: layout of quantized.cuh -> y H [out, stride].
struct Dequantize {
  const void* values;
  const void* scales;
  void* y;
  int out, stride;
};

// Parameters of linear_prompt_hopper.cu: as LinearPrompt, with W and x as tensors [rows, in] that are copied
// in boxes of 64 values by several rows: the part of a tile that one block of a cluster requests.
struct LinearTensors {
  TensorMap w, x;
  Result result;
  int steps;    // ceil(in / 64)
  int written;  // whether the preceding kernel writes w, which must then not be read before it ends
  // Numbers of groups along rows of W and along tokens; group: the tiles that a cluster computes at a time.
  int m_groups, n_groups;
};

}  // namespace qvl::cuda
