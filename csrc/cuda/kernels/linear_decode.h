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
// `columns` rows of x; a unit is `unit_bytes` of a tile's weights and, of 4 bits, `groups` scales per row.
constexpr int kColumnBytes = 2 * 128 + 64;  // of a column's unit; two columns lie in different banks

// Warps that share a tile.
QVL_BOTH_SIDES constexpr int wide_split(int row_tiles) {
  return row_tiles == 2 ? 2 : 1;
}
QVL_BOTH_SIDES constexpr int wide_stage_bytes(int unit_bytes, int groups, int columns, int row_tiles) {
  return wide_split(row_tiles) * (columns * kColumnBytes + row_tiles * (unit_bytes + 8 * 4 * groups));
}
// Offsets of the groups, and sums of the second half's pairs of slices: after the stages.
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
  int n, columns;                            // rows of x; columns: rows of x of a block
  int into;                                  // Into
  int tiles_at_once;                         // between barriers
  int x_pitch;                               // bytes of a row of x in shared memory
  int offsets_pitch;                         // floats of a group's offsets, one a column
  int scales_at, x_at, offsets_at, sums_at;  // bytes into shared memory, after the ring
};

// linear_decode_hopper.cu: warpgroups that share k; in the shared memory of their sums, floats between
// columns, and columns and 64-row subtiles at a time.
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
  // [64, N, steps]. Rows that are not whole boxes of 64 values: boxes of one step, [64, rows] and [64, N].
  TensorMap w, scales, x;
  bool whole;
  const float* row_scales;  // int8
  Result result;
  int rows, tiles;       // of W a tile: a multiple of 8, of 16 where quantised
  int all_steps, steps;  // of k, and in an item
  int items;             // a tile
  // A multiple of kHopperGroups, so that a stage always serves the same group, which then cannot mistake the
  // stage's previous round for the awaited one.
  int stages;
  int stage_bytes;
};

// A product whose rows have adapters: also computes A x of low_rank.h.
struct AdaptedLinearHopper {
  LinearHopper product;
  LowRankParams low_rank;
};

}  // namespace qvl::cuda
