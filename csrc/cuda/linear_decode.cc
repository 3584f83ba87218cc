// Launches of kernels/upload_matrix.cu and, on GPUs other than Hopper, of kernels/linear_decode.cu and
// linear_decode_wide.cu; linear_decode() calls linear_decode_hopper() on Hopper.
#include <algorithm>
#include <string>

#include "core/error.h"
#include "core/pack.h"
#include "cuda/kernels/linear_decode.h"
#include "cuda/linear_decode_hopper.h"
#include "cuda/tensor_map.h"

namespace qvl::cuda {
namespace {

// As in kernels/linear_decode.cu.
constexpr int kTileRows = 16, kWarps = 16, kThreads = 32 * kWarps, kUnit = 128;
constexpr int kMaxColumns = 8, kSumsPitch = 18, kStepBytes = 1024;
constexpr int kMaxRows = 256;

// As kDepth and kSharedBytes in the kernels: number of steps in the ring, and limit of shared memory per
// block.
int ring_depth(int arch) {
  if (arch < 80) return 2;
  return arch == 80 || (arch >= 100 && arch < 120) ? 5 : 3;
}
int shared_limit(int arch) {
  if (arch == 75) return 64 << 10;
  if (arch == 70) return 96 << 10;
  if (arch == 80) return 163 << 10;
  return arch >= 100 && arch < 120 ? 227 << 10 : 99 << 10;
}

// Bytes of the scales and zero points of a pair of rows in a step of linear_decode.cu.
int scale_bytes_of(const StorageInfo& storage) {
  if (storage.group == 0) return 0;
  return storage.zeros ? 8 * ((storage.bits == 8 ? 64 : kUnit) / storage.group) : 4 * (kUnit / storage.group);
}

uint64_t round_up(int value, int unit) {
  return static_cast<uint64_t>((value + unit - 1) / unit * unit);
}

// Lay out the shared memory of a block with `columns` rows of x, and return its size. The pitch of a row of x
// is a multiple of 128 bytes plus 64, so that two rows are in different banks.
int lay_out(int arch, const Matrix& matrix, int columns, int tiles_at_once, LinearDecode& p) {
  const StorageInfo& storage = info(matrix.storage);
  const int units = static_cast<int>(padded(matrix.in)) / kUnit;
  // groups: with 4 bits, number of groups per unit; the sum of a group starts at an offset
  // (linear_decode.cuh).
  const int depth = ring_depth(arch), groups = storage.bits == 4 ? kUnit / storage.group : 0;
  p.columns = columns;
  p.tiles_at_once = tiles_at_once;
  p.x_pitch = units * kUnit * 2 + 64;
  p.scales_at = depth * kWarps * kStepBytes;
  p.x_at = p.scales_at + depth * kWarps * 8 * scale_bytes_of(storage);  // 8 pairs of rows
  p.offsets_at = p.x_at + columns * p.x_pitch;
  p.offsets_pitch = (columns + 1) / 2 * 2;
  p.sums_at = p.offsets_at + units * groups * p.offsets_pitch * 4;
  return p.sums_at + 2 * kWarps * tiles_at_once * columns * kSumsPitch * 4;  // 2 buffers
}

// Launch kernels/linear_decode_wide.cu, for more than 8 rows of x; return false if no block fits the shared
// memory of this GPU, or if the matrix is so small that it would use at most 5 % of the multiprocessors.
bool launch_wide(const Gpu& gpu, CUstream stream, const Matrix& matrix, LinearDecode& p) {
  constexpr int kUnitBytes[] = {4096, 2048, 1024, 1024};  // tile x unit: kHalf, kInt8, kInt4G64, kInt4G128
  const int unit = kUnitBytes[static_cast<size_t>(matrix.storage)], limit = shared_limit(gpu.arch());
  const int groups = info(matrix.storage).group != 0 ? kUnit / info(matrix.storage).group : 0;
  p.columns = p.n <= 32 ? 32 : 64;
  const int tiles = static_cast<int>(round_up(matrix.out, kTileRows)) / kTileRows;
  const int chunks = (p.n + p.columns - 1) / p.columns;
  // Choose the number of tiles per block with the highest utilisation of the multiprocessors. Sizes are tried
  // from the largest; a smaller one must be better by 5 percentage points.
  int row_tiles = 0, shared = 0;
  double best_utilisation = 0;
  for (const int size : {12, 6, 2}) {
    const int stages = wide_stages(unit, groups, p.columns, size, limit);
    const int bytes =
        stages * wide_stage_bytes(unit, groups, p.columns, size) + wide_tail_bytes(groups, p.columns, size);
    const int blocks = (tiles + size - 1) / size * chunks, processors = gpu.multiprocessors();
    const int waves = (blocks + processors - 1) / processors;
    const double utilisation =
        static_cast<double>(tiles * chunks) / (static_cast<double>(waves) * processors * size);
    if (bytes > limit || utilisation <= best_utilisation + 0.05) continue;
    row_tiles = size;
    best_utilisation = utilisation;
    shared = bytes;
  }
  if (row_tiles == 0) return false;
  const std::string name = std::string("linear_wide_") + info(matrix.storage).name + "_" +
                           std::to_string(p.columns / 8) + "_" + std::to_string(row_tiles);
  gpu.launch(stream, name.c_str(),
             {static_cast<unsigned>((tiles + row_tiles - 1) / row_tiles), static_cast<unsigned>(chunks)},
             32 * row_tiles * wide_split(row_tiles), shared, p, /*early=*/true);
  return true;
}

}  // namespace

MatrixBytes matrix_bytes(Storage storage, int out, int in) {
  if (storage == Storage::kHalf) return {static_cast<uint64_t>(out) * round_up(in, 8) * 2, 0};
  const uint64_t rows = round_up(out, kTileRows), values = rows * static_cast<uint64_t>(padded(in));
  const StorageInfo& properties = info(storage);
  if (properties.group == 0) return {values, rows * sizeof(float)};
  return {values * static_cast<uint64_t>(properties.bits) / 8,
          values / static_cast<uint64_t>(properties.group) * (properties.zeros ? 4 : 2)};
}

Storage storage_of(qvl_dtype dtype) {
  switch (dtype) {
    case QVL_INT8:
      return Storage::kInt8;
    case QVL_INT4_G64:
      return Storage::kInt4G64;
    case QVL_INT4_G128:
      return Storage::kInt4G128;
    case QVL_UINT4_G32:
      return Storage::kUint4G32;
    case QVL_UINT4_G64:
      return Storage::kUint4G64;
    case QVL_UINT4_G128:
      return Storage::kUint4G128;
    case QVL_UINT8_G32:
      return Storage::kUint8G32;
    case QVL_UINT8_G64:
    case QVL_UINT8_G128:
      return Storage::kUint8G64;  // the scales of groups of 128 are stored twice (ops.h)
    default:
      return Storage::kHalf;
  }
}

void upload_matrix(const Gpu& gpu, CUstream stream, qvl_dtype dtype, const void* from, int out,
                   const Matrix& to, int first, int step) {
  QVL_REQUIRE(to.storage == storage_of(dtype) && first + (out - 1) * step < to.out, QVL_INTERNAL,
              "upload_matrix: dtype %d, row %d of %d", dtype, first + (out - 1) * step, to.out);
  UploadMatrix p{};
  p.from = from;
  p.from_scales = static_cast<const char*>(from) + value_bytes(dtype, out, to.in);
  p.values = to.values;
  p.scales = to.scales;
  p.rows = out;
  p.in = to.in;
  p.stride = to.stride;
  p.out = to.out;
  p.first = first;
  p.step = step;
  // The call that uploads the last row also writes the padding of its tile.
  if (to.storage != Storage::kHalf && first + (out - 1) * step == to.out - 1)
    p.padding = static_cast<int>(round_up(to.out, kTileRows)) - to.out;
  const char* name = dtype == QVL_FLOAT32      ? "float32"
                     : dtype == QVL_BFLOAT16   ? "bfloat16"
                     : dtype == QVL_FLOAT16    ? "float16"
                     : dtype == QVL_UINT8_G128 ? "uint8_g128"
                                               : info(to.storage).name;
  gpu.launch(stream, (std::string("upload_matrix_") + name).c_str(), {static_cast<unsigned>(out + p.padding)},
             /*threads=*/256, /*shared_bytes=*/0, p);
}

void linear_decode(const Gpu& gpu, CUstream stream, const Matrix& matrix, const void* x, int64_t x_stride,
                   int n, Epilogue epilogue, void* y, bool low_rank_next) {
  QVL_REQUIRE(n >= 1 && n <= kMaxRows, QVL_INTERNAL, "linear_decode: %d rows", n);
  QVL_REQUIRE(x_stride % 8 == 0, QVL_INTERNAL, "linear_decode: rows of x %lld values apart",
              static_cast<long long>(x_stride));
  if (has_tensor_maps(gpu))  // Hopper only: older and newer GPUs use the kernels below
    return linear_decode_hopper(gpu, stream, matrix, x, x_stride, n, epilogue, y, low_rank_next);
  LinearDecode p{};
  p.values = matrix.values;
  p.scales = matrix.scales;
  p.bias = matrix.bias;
  p.x = x;
  p.y = y;
  p.x_stride = x_stride;
  p.tile_bytes = static_cast<long long>(matrix_bytes(matrix.storage, kTileRows, matrix.in).values);
  p.out = matrix.out;
  p.in = matrix.in;
  p.stride = matrix.stride;
  p.n = n;
  p.epilogue = static_cast<int>(epilogue);

  // The kernel, its columns and its sizes may depend on n, since all of them give the same bits
  // (kernels/linear_decode.cuh).
  if (n > kMaxColumns && gpu.arch() >= 80 && !info(matrix.storage).zeros &&
      launch_wide(gpu, stream, matrix, p))
    return;
  const int limit = shared_limit(gpu.arch());
  int columns = std::min(n, kMaxColumns);
  while (columns > 1 && lay_out(gpu.arch(), matrix, columns, 1, p) > limit) --columns;
  int tiles_at_once = columns <= 2 ? 4 : columns <= 4 ? 2 : 1, shared = 0;
  while ((shared = lay_out(gpu.arch(), matrix, columns, tiles_at_once, p)) > limit && tiles_at_once > 1)
    tiles_at_once /= 2;
  QVL_REQUIRE(shared <= limit, QVL_UNSUPPORTED, "a matrix with %d columns is too wide for this GPU",
              matrix.in);
  const int tiles = static_cast<int>(round_up(matrix.out, kTileRows)) / kTileRows;
  const int chunks = (n + columns - 1) / columns;
  const int blocks = std::min(tiles, (gpu.multiprocessors() + chunks - 1) / chunks);
  // Request more than half of the shared memory of a multiprocessor, so that no multiprocessor gets two
  // blocks while another has none.
  gpu.launch(stream, (std::string("linear_decode_") + info(matrix.storage).name).c_str(),
             {static_cast<unsigned>(blocks), static_cast<unsigned>(chunks)}, kThreads,
             std::max(shared, limit / 2 + 2048), p, /*early=*/true);
}

}  // namespace qvl::cuda
