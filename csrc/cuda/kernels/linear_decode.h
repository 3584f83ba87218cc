// Parameters of linear_decode.cu, shared by host and device.
#pragma once

#ifdef __CUDACC__
#define QVL_BOTH_SIDES __host__ __device__
#else
#define QVL_BOTH_SIDES
#endif

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

// Shared memory of linear_decode_wide.cu, for host and device. A block has `row_tiles` tiles of W and
// `columns` rows of x; a unit is `unit_bytes` of a tile's weights and, of 4 bits, `groups` scales a row.
constexpr int kColumnBytes = 2 * 128 + 64;  // of a column's unit; two columns lie in different banks

// Warps that share a tile.
QVL_BOTH_SIDES constexpr int wide_split(int row_tiles) {
  return row_tiles == 2 ? 2 : 1;
}
QVL_BOTH_SIDES constexpr int wide_stage_bytes(int unit_bytes, int groups, int columns, int row_tiles) {
  return wide_split(row_tiles) * (columns * kColumnBytes + row_tiles * (unit_bytes + 8 * 4 * groups));
}
// Offsets of the groups, and sums of the second half's pairs of slices: behind the stages.
QVL_BOTH_SIDES constexpr int wide_rest_bytes(int groups, int columns, int row_tiles) {
  const int split = wide_split(row_tiles);
  return 4 * (split * groups * columns + (split > 1 ? row_tiles * 4 * columns * 16 : 0));
}
QVL_BOTH_SIDES constexpr int wide_stages(int unit_bytes, int groups, int columns, int row_tiles,
                                         int shared_bytes) {
  const int fit = (shared_bytes - wide_rest_bytes(groups, columns, row_tiles)) /
                  wide_stage_bytes(unit_bytes, groups, columns, row_tiles);
  return fit < 2 ? 2 : fit > 6 ? 6 : fit;
}

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
