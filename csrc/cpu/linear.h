// Products of activations with a weight matrix: y = x W^T + bias.
#pragma once

#include "cpu/context.h"

namespace qvl::cpu {

struct Matrix {
  const void* values = nullptr;
  const void* scales = nullptr;  // of quantised ones
  qvl_dtype dtype = QVL_FLOAT32;
  int64_t rows = 0;  // outputs
  int k = 0;         // inputs
  const float* bias = nullptr;

  // `n` rows from `first` on.
  Matrix slice(int64_t first, int64_t n) const;
};

// y [n_x][y_stride] (+)= x [n_x][x_stride] W^T + bias. x and y do not overlap.
//
// Up to kMaxRows activations go through the matrix-vector kernels, which stream the weights once; more
// through a blocked product.
void linear(Context& context, const Matrix& matrix, const float* x, int64_t x_stride, int64_t n_x, float* y,
            int64_t y_stride, bool add = false);

}  // namespace qvl::cpu
