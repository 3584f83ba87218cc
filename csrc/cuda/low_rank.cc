#include "cuda/low_rank.h"

#include <algorithm>

#include "cuda/kernels/low_rank.h"

namespace qvl::cuda {
namespace {

// Number of blocks for `rows` rows.
unsigned blocks(int rows, int block_rows) {
  return static_cast<unsigned>((rows + block_rows - 1) / block_rows);
}

LowRankParams params_of(const AdaptedRows& rows, const LowRankMemory& memory) {
  LowRankParams p{};
  // On the host uint64_t is a different type from unsigned long long, of the same size.
  p.adapters = reinterpret_cast<const unsigned long long*>(rows.adapters);
  p.order = rows.order;
  p.n = rows.n;
  p.product = rows.product;
  p.low = memory.low;
  p.low_stride = memory.stride;
  return p;
}

// Bytes of the counters of low_rank_down.
uint64_t counter_bytes(int rows, int stride) {
  return uint64_t{blocks(rows, kLowRankRows)} * blocks(stride, kLowRankDown) * kLowRankRuns * sizeof(int);
}

}  // namespace

uint64_t low_rank_scratch(int rows, int stride) {
  return counter_bytes(rows, stride) + uint64_t{kLowRankSlices} * sizeof(float) *
                                           static_cast<uint64_t>(rows) * static_cast<uint64_t>(stride);
}

void low_rank_down(const Gpu& gpu, CUstream stream, const AdaptedRows& rows, const void* x, int64_t x_stride,
                   int in, int rank, bool x_is_complete, const LowRankMemory& memory) {
  LowRankParams p = params_of(rows, memory);
  p.x = x;
  p.x_stride = x_stride;
  p.in = in;
  p.x_is_complete = x_is_complete;
  p.counters = static_cast<int*>(memory.scratch);
  p.slices = reinterpret_cast<float*>(static_cast<char*>(memory.scratch) +
                                      counter_bytes(memory.rows, memory.stride));
  Dim grid{blocks(rank, kLowRankDown), blocks(rows.n, kLowRankRows),
           static_cast<unsigned>(kLowRankSlices * std::min(kLowRankRuns, rows.n))};
  p.block_slices = grid.x * grid.y * grid.z <= kLowRankOneSlice ? 1 : kLowRankMaxSlices;
  grid.z /= static_cast<unsigned>(p.block_slices);
  gpu.launch(stream, "low_rank_down", grid, kLowRankDownThreads, 0, p, /*early=*/true);
}

void low_rank_up(const Gpu& gpu, CUstream stream, const AdaptedRows& rows, const LowRankMemory& memory,
                 int out, const float* raw, Epilogue epilogue, void* y) {
  LowRankParams p = params_of(rows, memory);
  // Without raw, y already contains W x, or its sum with the former y.
  p.raw = raw != nullptr ? raw : static_cast<const float*>(y);
  if (raw == nullptr) epilogue = Epilogue::kFloat;
  p.result = {nullptr, y, rows.n, out, static_cast<int>(epilogue)};
  gpu.launch(stream, "low_rank_up", {blocks(out, kLowRankUp), blocks(rows.n, kLowRankRows)}, kLowRankThreads,
             0, p, /*early=*/true);
}

void finish_raw(const Gpu& gpu, CUstream stream, const float* raw, int n, int out, Epilogue epilogue,
                void* y) {
  const FinishParams p{raw, {nullptr, y, n, out, static_cast<int>(epilogue)}};
  gpu.launch(stream, "finish_raw", {blocks(out, 2 * kFinishThreads), static_cast<unsigned>(n)},
             kFinishThreads, 0, p, /*early=*/true);
}

}  // namespace qvl::cuda
