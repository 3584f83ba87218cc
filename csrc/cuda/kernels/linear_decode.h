// Parameters of linear_decode.cu, shared by host and device.
#pragma once

namespace qvl::cuda {

struct UploadMatrix {
  const void* from;
  const void* from_scales;  // quantised
  void* values;
  void* scales;
  int rows;  // of `from`, and rows of zeros to add behind the last one
  int padding;
  int in, stride;
  int first, step;
};

struct LinearDecode {
  const void* values;
  const void* scales;
  const float* bias;
  const void* x;
  void* y;
  long long x_stride;
  long long tile_bytes;  // from one tile's values to the next one's
  int out, in, stride;
  int n, columns;                            // rows of x, and how many of them a block takes
  int into;                                  // Into
  int tiles_at_once;                         // between barriers
  int x_pitch;                               // bytes of a row of x in shared memory
  int offsets_pitch;                         // floats of a group's offsets, one a column
  int scales_at, x_at, offsets_at, sums_at;  // bytes into shared memory, behind the ring
};

}  // namespace qvl::cuda
