// Parameters of the kernels in vision.cu, for host and device. H: the compute type, bfloat16 or float16.
#pragma once

namespace qvl::cuda {

struct CutPatchesParams {
  const float* images;  // [n, 3, size, size]
  void* y;              // H [n * patches of an image, stride]
  int size, patch;      // sides of an image and of a patch in pixels
  int stride;           // values of a row of y: those of a patch and padding zeros
};

struct LayerNormParams {
  const float* x;  // [rows, width]
  const float* weight;
  const float* bias;
  const float* add;  // [period, width], row i % period is added to row i of y_half only; may be NULL
  void* y_half;      // H [rows, width]; may be NULL
  float* y_float;    // [rows, width]; may be NULL
  int width, period;
  float epsilon;
};

constexpr int kAddThreads = 256;

struct AddRowsParams {
  float* x;
  const float* add;
  long long values, period;  // lengths of x and of `add`, which repeats; in float4 for add_rows_4
};

}  // namespace qvl::cuda
