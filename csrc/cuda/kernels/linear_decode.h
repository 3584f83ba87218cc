// Parameters of the products of decode steps, shared by host and device.
#pragma once

#include "cuda/kernels/low_rank.h"
#include "cuda/kernels/tensor_map.h"

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
  int rows;  // of `from`; padding: rows of zeros to add after the last one
  int padding;
  int in, stride;
  int out;  // rows of the matrix with padding rows excluded
  int first, step;
};

// Shared memory of linear_decode_wide.cu, for host and device. A block has `row_tiles` tiles of W and
// `columns` rows of x; a unit is `unit_bytes` of a tile's weights and, with 4 bits, `groups` scales per row.
constexpr int kColumnBytes = 2 * 128 + 64;  // per column and unit; two columns are in different banks

// Number of warps that share a tile.
QVL_BOTH_SIDES constexpr int wide_split(int row_tiles) {
  return row_tiles == 2 ? 2 : 1;
}
QVL_BOTH_SIDES constexpr int wide_stage_bytes(int unit_bytes, int groups, int columns, int row_tiles) {
  return wide_split(row_tiles) * (columns * kColumnBytes + row_tiles * (unit_bytes + 8 * 4 * groups));
}
// Bytes after the stages: offsets of the groups, and sums of the second half's pairs of slices.
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
  long long tile_bytes;  // between the values of successive tiles
  int out, in, stride;
  int n, columns;                            // rows of x in total and per block
  int into;                                  // Into
  int tiles_at_once;                         // tiles between barriers
  int x_pitch;                               // bytes of a row of x in shared memory
  int offsets_pitch;                         // floats of a group's offsets, one per column
  int scales_at, x_at, offsets_at, sums_at;  // byte offsets in shared memory, after the ring
};

// linear_decode_hopper.cu: number of warpgroups that share k; for their sums in shared memory, floats between
// columns, and numbers of columns and 64-row subtiles at a time.
constexpr int kHopperGroups = 4, kHopperColumn = 64 + 4;
QVL_BOTH_SIDES constexpr int hopper_columns(int n) {
  return n < 32 ? n : 32;
}
QVL_BOTH_SIDES constexpr int hopper_parts(int n, int parts) {
  return n > 16 ? 1 : n > 8 && parts > 2 ? 2 : parts;
}
QVL_BOTH_SIDES constexpr int hopper_sum_bytes(int n, int parts) {
  return 4 * kHopperGroups * hopper_parts(n, parts) * hopper_columns(n) * kHopperColumn;
}

struct LinearHopper {
  // Boxes of an item. W: H [64, rows, steps], or quantised lines of 512 bytes, and scales of 16 rows. x: H
  // [64, N, steps]. If rows are not whole boxes of 64 values: boxes of one step, [64, rows] and [64, N].
  TensorMap w, scales, x;
  bool whole;
  const float* row_scales;  // int8
  Result result;
  int rows, tiles;       // rows of W per tile: a multiple of 8, if quantised of 16; number of tiles
  int all_steps, steps;  // steps of k in total and per item
  int items;             // items per tile
  // A multiple of kHopperGroups, so that a stage always serves the same group, which thus cannot mistake the
  // stage's previous round for the current one.
  int stages;
  int stage_bytes;
};

// Parameters of a product with adapters, which also computes A x (low_rank.h).
struct AdaptedLinearHopper {
  LinearHopper product;
  LowRankParams low_rank;
};

}  // namespace qvl::cuda
