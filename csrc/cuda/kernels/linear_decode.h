// Parameters of upload_matrix.cu and of the products of decode steps, shared by host and device. H: the
// compute type, bfloat16 or float16.
#pragma once

#include "cuda/kernels/linear_prompt.h"
#include "cuda/kernels/tensor_map.h"

#ifdef __CUDACC__
#define QVL_BOTH_SIDES __host__ __device__
#else
#define QVL_BOTH_SIDES
#endif

namespace qvl::cuda {

// Parameters of upload_matrix (ops.h).
struct UploadMatrix {
  const void* from;         // values in the layout of a file
  const void* from_scales;  // quantized: scales, then zero points if any
  void* values;             // values and scales in the layout of the kernels
  void* scales;
  int rows;         // of `from`
  int padding;      // number of rows of zeros to write after the last row
  int in, stride;   // columns, without and with padding
  int out;          // rows of the matrix, without padding rows
  int first, step;  // row r of `from` becomes row first + r * step
};

// Shared memory of linear_decode_wide.cu, for host and device. A block has `row_tiles` tiles of 16 rows of W
// and `columns` rows of x. A unit (128 values of k) of a tile has unit_bytes bytes of weights and, with 4
// bits, `groups` scales of 2 bytes per row; types with zero points use other kernels.
constexpr int kColumnBytes = 2 * 128 + 64;  // per column and unit; 64 bytes of padding against bank conflicts

// Number of warps that share a tile.
QVL_BOTH_SIDES constexpr int wide_split(int row_tiles) {
  return row_tiles == 2 ? 2 : 1;
}
QVL_BOTH_SIDES constexpr int wide_stage_bytes(int unit_bytes, int groups, int columns, int row_tiles) {
  return wide_split(row_tiles) * (columns * kColumnBytes + row_tiles * (unit_bytes + 8 * 4 * groups));
}
// Bytes after the stages: the initial sums of the groups ("offsets"), and if two warps share a tile, its sums
// of 4 pairs of slices of k, which the warp of the second half of k passes to that of the first.
QVL_BOTH_SIDES constexpr int wide_tail_bytes(int groups, int columns, int row_tiles) {
  const int split = wide_split(row_tiles);
  return 4 * (split * groups * columns + (split > 1 ? row_tiles * 4 * columns * 16 : 0));
}
// Number of stages that fit, at most 6. 2 if fewer than two fit: the launcher then rejects the block.
QVL_BOTH_SIDES constexpr int wide_stages(int unit_bytes, int groups, int columns, int row_tiles,
                                         int shared_bytes) {
  const int fit = (shared_bytes - wide_tail_bytes(groups, columns, row_tiles)) /
                  wide_stage_bytes(unit_bytes, groups, columns, row_tiles);
  return fit < 2 ? 2 : fit > 6 ? 6 : fit;
}

// Parameters of linear_decode.cu and linear_decode_wide.cu. Fields without a comment: see Matrix and
// linear_decode() in ops.h.
struct LinearDecode {
  const void* values;
  const void* scales;
  const float* bias;
  const void* x;
  void* y;
  long long x_stride;
  long long tile_bytes;  // from the values of a tile to those of the next tile
  int out, in, stride;
  int n, columns;  // rows of x in total and per block
  int epilogue;    // Epilogue
  // Only linear_decode.cu: tiles that a block sums between two barriers; pitches and byte offsets of the
  // areas after the ring in shared memory.
  int tiles_at_once;
  int x_pitch;        // bytes from a row of x to the next
  int offsets_pitch;  // floats from a group's offsets, one per column, to the next group's
  int scales_at, x_at, offsets_at, sums_at;
};

// Constants of linear_decode_hopper.cuh.
constexpr int kHopperGroups = 4;       // warpgroups, which share k
constexpr int kHopperColumn = 64 + 4;  // floats from a column of sums in shared memory to the next

// For tiles of n rows of x (columns) and `parts` subtiles of 64 rows of W: number of columns and number of
// subtiles whose sums are in shared memory at a time, and bytes of these sums. A large number needs fewer
// barriers, a small one leaves memory for twice as many stages; the faster ones were found by measurement.
QVL_BOTH_SIDES constexpr int hopper_columns(int n, bool quantized, bool has_groups) {
  const int most = quantized && !(n == 32 && has_groups) ? 16 : 32;
  return n < most ? n : most;
}
QVL_BOTH_SIDES constexpr int hopper_parts(int n, int parts, bool quantized) {
  return n > (quantized ? 8 : 16) ? 1 : n > 8 && parts > 2 ? 2 : parts;
}
QVL_BOTH_SIDES constexpr int hopper_sum_bytes(int n, int parts, bool quantized, bool has_groups) {
  return 4 * kHopperGroups * hopper_parts(n, parts, quantized) * hopper_columns(n, quantized, has_groups) *
         kHopperColumn;
}

// Parameters of linear_decode_hopper.cuh.
struct LinearHopper {
  // The boxes that one copy loads for an item (`steps` steps of k), contiguous dimension first:
  //   w        H [64, rows, steps]; quantized: lines of 512 bytes
  //   scales   lines with the scales and any zero points of 16 rows in a step
  //   x        H [64, N, steps], with quantized w [64, N, 2 * steps]; N: rows of x per tile
  // If `in` is not a multiple of 64 (not whole_boxes), boxes of H are [64, rows] and [64, N].
  TensorMap w, scales, x;
  bool whole_boxes;
  bool late_successors;     // start the next kernel only when x is complete
  const float* row_scales;  // read only for int8
  Result result;
  int rows, tiles;         // rows of W per tile: a multiple of 8, if quantized of 16; number of tiles
  int total_steps, steps;  // steps of k in total and per item
  int items;               // items per tile; an item is `steps` steps, copied together into a stage
  // Number of stages, a multiple of kHopperGroups: a stage then always serves the same warpgroup, which
  // therefore cannot mistake the previous round of the stage for the current one.
  int stages;
  int stage_bytes;
};

}  // namespace qvl::cuda
