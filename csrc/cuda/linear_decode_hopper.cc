#include "cuda/linear_decode_hopper.h"

#include <algorithm>
#include <string>

#include "core/error.h"
#include "cuda/kernels/linear_decode.h"
#include "cuda/tensor_map.h"

namespace qvl::cuda {
namespace {

// Threads of the warpgroups and of the warp that copies; alignment of a stage; bytes of a box row.
constexpr int kThreads = 128 * kHopperGroups + 32, kAlign = 1024, kBoxBytes = 128;
constexpr int kMaxShared = 227 << 10;
// Over half of the 228 KiB of a multiprocessor: it has only one block of this kernel or of the next product
// (kernels/linear_decode_hopper.cuh).
constexpr int kMinShared = 120 << 10;
// Limit of shared memory with up to 16 rows of x. Of the 228 KiB it leaves enough for a block of
// attention_decode (64 KiB and a few bytes) and for the 1 KiB that CUDA reserves for each block.
constexpr int kSharedBesideAttention = 158 << 10;
constexpr int kMaxStages = 32, kMaxSteps = 4;  // stages of the ring; steps per item, the content of a stage

// Properties of a storage type.
struct Kind {
  int tile_bytes;    // of the values of 16 rows of W in a step of k
  int scale_bytes;   // of the scales and zero points of these values
  int boxes;         // number of boxes of x per step: 64 values of each row of x in the tile
  int max_parts[3];  // maximum number of 64-row subtiles per tile, for up to 16, 32 and 64 rows of x
};
Kind kind_of(Storage storage) {
  if (storage == Storage::kHalf) return {16 * kBoxBytes, 0, 1, {3, 3, 2}};
  constexpr int kUnit = 128;
  const StorageInfo& of = info(storage);
  const int scale_bytes = of.group == 0 ? 0 : 16 * (of.zeros ? 4 : 2) * (kUnit / of.group);
  return {16 * kUnit * of.bits / 8, scale_bytes, kUnit / 64, {3, 2, 1}};
}

int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

// Bytes copied per step.
int step_bytes(const Kind& kind, int rows, int columns) {
  return rows / 8 * (kind.tile_bytes + kind.scale_bytes) / 2 + kind.boxes * kBoxBytes * columns;
}

// Rows of W per tile, a multiple of `unit` up to max_rows, with the lowest estimated time: number of rounds,
// in which each block computes a tile, times (bytes copied + a fixed cost per round, expressed in bytes).
int best_rows(const Kind& kind, int out, int steps, int columns, int blocks, int unit, int max_rows) {
  constexpr double kRoundCost = 40e3;
  int best = unit;
  double lowest_cost = 0;
  for (int rows = unit; rows <= max_rows; rows += unit) {
    const int rounds = divide_up(divide_up(out, rows), blocks);
    const double cost = rounds * (steps * static_cast<double>(step_bytes(kind, rows, columns)) + kRoundCost);
    if (lowest_cost == 0 || cost <= lowest_cost) best = rows, lowest_cost = cost;
  }
  return best;
}

// Steps per item with the lowest estimated time, expressed in bytes: each item has a fixed cost, and large
// items copy steps beyond the end of a slice. slice: steps per slice, the part of k of a warpgroup; bytes:
// bytes per step. An item of several steps has at most kMaxBytes.
int best_steps(int slice, int bytes) {
  constexpr int kItemCost = 1500, kMaxBytes = 24 << 10;
  int best = 1, lowest_cost = 0;
  for (int steps = 1; steps <= kMaxSteps && (steps == 1 || steps * bytes <= kMaxBytes); ++steps) {
    const int cost = divide_up(slice, steps) * (steps * bytes + kItemCost);
    if (lowest_cost == 0 || cost < lowest_cost) best = steps, lowest_cost = cost;
  }
  return best;
}

// Tensor map of rows of H in boxes of 64 values x `box` rows; if `in` is a multiple of 64, a copy loads
// `steps` boxes.
TensorMap boxes_of(const Gpu& gpu, const void* base, int64_t rows, int64_t in, int64_t stride, int box,
                   int steps) {
  if (in % 64 != 0) return tensor_map(gpu, base, {in, rows}, {stride * 2}, {64, box});
  return tensor_map(gpu, base, {64, rows, in / 64}, {stride * 2, kBoxBytes}, {64, box, steps});
}

}  // namespace

void linear_decode_hopper(const Gpu& gpu, CUstream stream, const Matrix& matrix, const void* x,
                          int64_t x_stride, int n, Epilogue epilogue, void* y, bool low_rank_next) {
  const bool half = matrix.storage == Storage::kHalf;
  const Kind kind = kind_of(matrix.storage);
  const int columns = n <= 8 ? 8 : n <= 16 ? 16 : n <= 32 ? 32 : 64;
  const int chunks = divide_up(n, columns);
  const int blocks = std::max(1, gpu.multiprocessors() / chunks);

  LinearHopper p{};
  p.late_successors = low_rank_next;
  p.row_scales = static_cast<const float*>(matrix.scales);
  p.result = {matrix.bias, y, n, matrix.out, static_cast<int>(epilogue)};
  p.whole_boxes = matrix.in % 64 == 0;
  p.total_steps = divide_up(matrix.in, 64 * kind.boxes);
  const int max_rows = 64 * kind.max_parts[columns <= 16 ? 0 : columns / 32];
  p.rows = best_rows(kind, matrix.out, p.total_steps, columns, blocks, half ? 8 : 16, max_rows);
  p.tiles = divide_up(matrix.out, p.rows);
  const int bytes = step_bytes(kind, p.rows, columns), slice = divide_up(p.total_steps, kHopperGroups);
  p.steps = best_steps(slice, bytes);
  p.items = kHopperGroups * divide_up(slice, p.steps);
  p.stage_bytes = divide_up(p.steps * bytes, kAlign) * kAlign;
  const int parts = divide_up(p.rows, 64);
  const int sums = hopper_sum_bytes(columns, parts, !half, info(matrix.storage).group != 0);
  const int available = (columns <= 16 ? kSharedBesideAttention : kMaxShared) - kAlign - sums;
  // 16: bytes of the two barriers of a stage.
  p.stages = std::min(kMaxStages, available / (p.stage_bytes + 16) / kHopperGroups * kHopperGroups);
  const int shared = kAlign + p.stages * (p.stage_bytes + 16) + sums;

  if (half) {
    p.w = boxes_of(gpu, matrix.values, matrix.out, matrix.in, matrix.stride, p.rows, p.steps);
  } else {
    constexpr int kLine = 512;  // bytes
    const int tiles = divide_up(matrix.out, 16), lines = kind.tile_bytes / kLine;
    p.w = tensor_map(gpu, matrix.values, {kLine / 2, tiles * lines, p.total_steps},
                     {kLine, tiles * kind.tile_bytes}, {kLine / 2, p.rows / 16 * lines, p.steps},
                     /*swizzled=*/false);
    if (kind.scale_bytes != 0) {
      p.scales = tensor_map(gpu, matrix.scales, {kind.scale_bytes / 2, tiles, p.total_steps},
                            {kind.scale_bytes, tiles * kind.scale_bytes},
                            {kind.scale_bytes / 2, p.rows / 16, p.steps}, /*swizzled=*/false);
    }
  }
  p.x = boxes_of(gpu, x, n, matrix.in, x_stride, columns, kind.boxes * p.steps);

  const std::string name = std::string("linear_hopper_") + info(matrix.storage).name + "_" +
                           std::to_string(columns) + "_" + std::to_string(parts);
  const Dim grid{static_cast<unsigned>(std::min(p.tiles, blocks)), static_cast<unsigned>(chunks)};
  gpu.launch(stream, name.c_str(), grid, kThreads, std::max(shared, kMinShared), p, /*early=*/true);
}

}  // namespace qvl::cuda
