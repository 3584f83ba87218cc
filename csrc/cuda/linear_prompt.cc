// Launches of kernels/linear_prompt.cu, linear_prompt_hopper.cu and linear_dequantize.cu.
#include "cuda/linear_prompt.h"

#include <algorithm>
#include <string>

#include "core/error.h"
#include "cuda/kernels/linear_prompt.h"
#include "cuda/tensor_map.h"

namespace qvl::cuda {
namespace {

// A variant of linear_prompt_hopper.cu.
struct TileVariant {
  const char* name;
  int parts, tokens;         // tile: 64 * parts rows of W x tokens
  int cluster_m, cluster_n;  // tiles per cluster along rows of W and along tokens
  int buffers, blocks;       // stages of the ring, blocks per multiprocessor
};

constexpr TileVariant kTiles[] = {
#define QVL_LINEAR(C, N, CM, CN, S, BLOCKS) \
  {"linear_prompt_" #C "x" #N "_" #CM "x" #CN, C, N, CM, CN, S, BLOCKS},
#include "cuda/kernels/linear_prompt_tiles.h"
#undef QVL_LINEAR
};
constexpr int kTileCount = static_cast<int>(sizeof kTiles / sizeof *kTiles);

int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

// Numbers of groups along rows of W and along tokens; group: the tiles that a cluster computes at a time.
struct GroupGrid {
  int m, n;
};
GroupGrid group_grid(const TileVariant& tile, int out, int n) {
  return {divide_up(out, 64 * tile.parts * tile.cluster_m), divide_up(n, tile.tokens * tile.cluster_n)};
}

// Estimated time of a product in cycles. In a round each block computes a tile, in steps of 64 values of k,
// and its epilogue. The constants were measured on an H200: wgmma at 8 / 9 of its peak rate (in a step 2.25
// cycles per token and 64 rows of W instead of 2), 47 bytes per cycle into a multiprocessor, with and without
// multicast, and 2500 cycles plus 12 per token of the tile for the start and the epilogue of a round.
double cycles(const Gpu& gpu, const TileVariant& tile, int out, int in, int n) {
  const GroupGrid groups = group_grid(tile, out, n);
  const int cluster = tile.cluster_m * tile.cluster_n, resident = gpu.multiprocessors() / cluster;
  const int rounds = divide_up(groups.m * groups.n, resident * tile.blocks);
  const int blocks = std::min(tile.blocks, divide_up(groups.m * groups.n, resident));
  const double products = 2.25 * tile.parts * tile.tokens;
  const double bytes = 128.0 * (64 * tile.parts + tile.tokens);
  return rounds * (blocks * std::max(products, bytes / 47) * divide_up(in, 64) + 2500 + 12 * tile.tokens);
}

// Tensor map in boxes of 64 values x `box` rows.
TensorMap rows_of(const Gpu& gpu, const void* base, int64_t rows, int64_t columns, int64_t stride, int box) {
  return tensor_map(gpu, base, {columns, rows}, {stride * 2}, {64, box});
}

}  // namespace

int linear_prompt_tiles(const Gpu& gpu) {
  return has_tensor_maps(gpu) ? kTileCount : 0;
}

const char* linear_prompt_tile_name(int tile) {
  return tile < 0 ? "linear_prompt" : kTiles[tile].name;
}

int linear_prompt_tile(const Gpu& gpu, int out, int in, int n) {
  int best = -1;
  double lowest_time = 0;
  for (int i = 0; i < linear_prompt_tiles(gpu); ++i) {
    const double time = cycles(gpu, kTiles[i], out, in, n);
    if (best < 0 || time < lowest_time) best = i, lowest_time = time;
  }
  return best;
}

namespace {

// written: whether the preceding kernel writes the matrix, as dequantization does.
void launch(const Gpu& gpu, CUstream stream, int tile, const Matrix& matrix, const void* x, int64_t x_stride,
            int n, Epilogue epilogue, void* y, bool written) {
  QVL_REQUIRE(matrix.stride % 8 == 0 && x_stride % 8 == 0, QVL_INTERNAL,
              "the strides of matrices and activations must be multiples of 8 values");
  const Result result{matrix.bias, y, n, matrix.out, static_cast<int>(epilogue)};
  if (tile < 0) {
    // As in kernels/linear_prompt.cu: 3 buffers of 128 rows of x and 128 of W, in rows of 32 + 8 values of H.
    // Before sm_80 the kernel uses no shared memory.
    constexpr int kTile = 128, kThreads = 256, kShared = 3 * 2 * kTile * (32 + 8) * 2;
    const LinearPrompt params{result, x, matrix.values, x_stride, matrix.in, matrix.stride};
    const Dim grid{static_cast<unsigned>(divide_up(n, kTile)),
                   static_cast<unsigned>(divide_up(matrix.out, kTile))};
    gpu.launch(stream, "linear_prompt", grid, kThreads, gpu.arch() >= 80 ? kShared : 0, params,
               /*early=*/true);
    return;
  }
  const TileVariant& t = kTiles[tile];
  const int rows = 64 * t.parts, cluster = t.cluster_m * t.cluster_n;
  LinearTensors params;
  params.w = rows_of(gpu, matrix.values, matrix.out, matrix.in, matrix.stride, rows / t.cluster_n);
  params.x = rows_of(gpu, x, n, matrix.in, x_stride, t.tokens / t.cluster_m);
  params.result = result;
  params.steps = divide_up(matrix.in, 64);
  params.written = written ? 1 : 0;
  const GroupGrid groups = group_grid(t, matrix.out, n);
  params.m_groups = groups.m;
  params.n_groups = groups.n;
  const int resident = gpu.multiprocessors() * t.blocks / cluster;
  const Dim grid{static_cast<unsigned>(std::min(groups.m * groups.n, resident) * cluster)};
  // kChunk: kChunkBytes of kernels/linear_prompt_hopper.cu; 16 bytes per buffer for two barriers.
  constexpr int kChunk = 32 * 68 * 4, kAlign = 1024;
  const int shared = t.buffers * ((rows + t.tokens) * 128 + 16) + t.parts * kChunk + kAlign;
  gpu.launch(stream, t.name, grid, 128 * (t.parts + 1), shared, params, /*early=*/true);
}

}  // namespace

void linear_prompt_with(const Gpu& gpu, CUstream stream, int tile, const Matrix& matrix, const void* x,
                        int64_t x_stride, int n, Epilogue epilogue, void* y) {
  launch(gpu, stream, tile, matrix, x, x_stride, n, epilogue, y, /*written=*/false);
}

uint64_t linear_prompt_scratch(const Matrix& matrix) {
  return matrix.storage == Storage::kHalf ? 0 : uint64_t{2} * matrix.out * matrix.stride;
}

void linear_prompt(const Gpu& gpu, CUstream stream, const Matrix& matrix, const void* x, int64_t x_stride,
                   int n, Epilogue epilogue, void* y, void* scratch) {
  Matrix half = matrix;
  if (matrix.storage != Storage::kHalf) {
    half.storage = Storage::kHalf;
    half.values = scratch;
    const std::string name = std::string("dequantize_") + info(matrix.storage).name;
    constexpr int kThreads = 256, kValues = 8;
    const int64_t threads = static_cast<int64_t>(matrix.out) * matrix.stride / kValues;
    const Dequantize params{matrix.values, matrix.scales, scratch, matrix.out, matrix.stride};
    gpu.launch(stream, name.c_str(), {static_cast<unsigned>((threads + kThreads - 1) / kThreads)}, kThreads,
               0, params, /*early=*/true);
  }
  launch(gpu, stream, linear_prompt_tile(gpu, matrix.out, matrix.in, n), half, x, x_stride, n, epilogue, y,
         matrix.storage != Storage::kHalf);
}

}  // namespace qvl::cuda
