// Linear layers: y = x W^T + bias.
#pragma once

#include "cpu/context.h"

namespace qvl::cpu {

// Weights [rows, k] of a linear layer, in the memory of the engine's tensors (core/tensors.h) or of an
// adapter; the bias is a float32 copy owned by the back end.
struct Matrix {
  const void* values = nullptr;
  const void* scales = nullptr;  // only for quantized types
  qvl_dtype dtype = QVL_FLOAT32;
  int64_t rows = 0;  // outputs
  int k = 0;         // inputs
  const float* bias = nullptr;
  const void* zeros = nullptr;     // only for types with zero points
  const int32_t* order = nullptr;  // [k]: stored column j multiplies x[order[j]]; NULL: x[j]

  // Matrix stored at `data` in the layout of qvl_packed_bytes.
  static Matrix stored(qvl_dtype dtype, int64_t rows, int64_t k, const void* data,
                       const float* bias = nullptr);

  // Rows [first, first + n).
  Matrix slice(int64_t first, int64_t n) const;
};

// Numbers of rows of activations; rows of prompts and images precede rows of decode steps.
struct Rows {
  int64_t prompt;
  int64_t decode;

  int64_t n() const { return prompt + decode; }
};

// y [n][y_stride] (+)= x [n][x_stride] W^T + bias. x and y do not overlap.
//
// Prompt rows use the blocked product, in bfloat16 on the ISA avx512_bf16 unless the compute type or the
// weights are float32, otherwise in float32. Decode rows use the matrix-vector kernels, which read the
// weights from memory once, and round x to 8 bits if the weights are integers. Exception: if the context is
// exact (QVL_COMPUTE_FLOAT32) and the type has zero points, decode rows use the blocked product as well,
// without this rounding. A row's result has the same bits for any number of rows.
void linear(Context& context, const Matrix& matrix, const float* x, int64_t x_stride, Rows rows, float* y,
            int64_t y_stride, bool add = false);

}  // namespace qvl::cpu
