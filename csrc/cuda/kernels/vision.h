// Parameters of the kernels in vision.cu, for host and device. Fields: see the functions in ops.h.
#pragma once

namespace qvl::cuda {

struct CutPatchesParams {
  const float* images;
  void* y;
  int size, patch;  // sides of an image and of a patch in pixels
  int stride;       // values of a row of y
};

struct LayerNormParams {
  const float* x;
  const float* weight;
  const float* bias;
  const float* add;  // may be NULL
  void* y_half;      // may be NULL
  float* y_float;    // may be NULL
  int width, period;
  float epsilon;
};

constexpr int kAddThreads = 256;

struct AddRowsParams {
  float* x;
  const float* add;
  long long values, period;  // counted in float4 by add_rows_4
};

}  // namespace qvl::cuda
