// Products of prompts: tensor cores through mma.sync from sm_80 on, plain loops on older GPUs. On Hopper only
// tests run this kernel; the engine uses linear_prompt_hopper.cu there.
//
// Layout. A block computes 128 tokens x 128 rows of W, with 8 warps of 64 x 32 each. Steps of 32 values of k
// pass through three buffers in shared memory, filled by cp.async:
//
//                       128 rows of W
//               +------+------+------+------+
//   64 tokens   |warp 0|warp 1|warp 2|warp 3|      buffer: x [128][32 + 8] | W [128][32 + 8] of H
//               +------+------+------+------+      rows are 80 bytes apart, so that the 8 rows of an
//   64 tokens   |warp 4|warp 5|warp 6|warp 7|      ldmatrix are in different banks
//               +------+------+------+------+
//
// Each sum has one accumulator and adds ascending steps of 16 values of k: the bits of a token's result
// depend only on W and the token's row of x.
//
// Cost. Operations: 2 * n * in * out. Bytes: a block reads 2 x 128 rows for 128 x 128 sums, one byte per 64
// operations, which the L2 cache can supply. Bound by mma.sync.
//
// Reference: float64 in PyTorch, tests/cuda/test_prompt_linear.py.
#include "cuda/kernels/linear_prompt.cuh"
#include "cuda/kernels/mma.cuh"

namespace qvl::cuda {

constexpr int kTile = 128, kThreads = 256;

#if __CUDA_ARCH__ >= 800

constexpr int kStep = 32, kRow = kStep + 8, kBuffers = 3;

// Copy values k .. k + 31 of rows first .. first + 127 of `from` [n, stride]; zeros out of range.
__device__ inline void load_tile(H* to, const H* from, int64 stride, int first, int n, int k, int in) {
  for (int i = threadIdx.x; i < kTile * kStep / 8; i += kThreads) {
    const int row = i / (kStep / 8), column = i % (kStep / 8) * 8;
    const int valid_bytes = first + row < n ? 2 * (in - k - column) : 0;
    const H* source = valid_bytes > 0 ? from + (first + row) * stride + k + column : from;
    copy_async(to + row * kRow + column, source, min(max(valid_bytes, 0), 16));
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) linear_prompt(const __grid_constant__ LinearPrompt p) {
  extern __shared__ __align__(16) H shared[];
  wait_for_predecessors();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_token = blockIdx.x * kTile, first_out = blockIdx.y * kTile;
  const int steps = (p.in + kStep - 1) / kStep;
  float sums[4][4][4] = {};
  auto load = [&](int step) {
    if (step < steps) {
      H* buffer = shared + step % kBuffers * 2 * kTile * kRow;
      load_tile(buffer, static_cast<const H*>(p.x), p.x_stride, first_token, p.result.n, step * kStep, p.in);
      load_tile(buffer + kTile * kRow, static_cast<const H*>(p.w), p.stride, first_out, p.result.out,
                step * kStep, p.in);
    }
    commit_copies();
  };
  for (int step = 0; step < kBuffers - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kBuffers - 2>();
    __syncthreads();
    load(step + kBuffers - 1);
    const H* x = shared + step % kBuffers * 2 * kTile * kRow + warp / 4 * 64 * kRow;
    const H* w = shared + step % kBuffers * 2 * kTile * kRow + (kTile + warp % 4 * 32) * kRow;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32 a[4][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_matrices(a[i], x + (16 * i + lane % 16) * kRow + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_matrices(b[j], w + (16 * j + lane / 16 * 8 + lane % 8) * kRow + k + lane / 8 % 2 * 8);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
  start_successors();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = first_token + warp / 4 * 64 + 16 * i + lane / 4;
      const int column = first_out + warp % 4 * 32 + 8 * j + lane % 4 * 2;
      if (column >= p.result.out) continue;
      if (token < p.result.n) finish_pair(p.result, token, column, sums[i][j][0], sums[i][j][1]);
      if (token + 8 < p.result.n) finish_pair(p.result, token + 8, column, sums[i][j][2], sums[i][j][3]);
    }
  }
}

#else

// Version for GPUs before sm_80: a thread iterates over k for two columns.
extern "C" __global__ void __launch_bounds__(kThreads) linear_prompt(const __grid_constant__ LinearPrompt p) {
  for (int i = threadIdx.x; i < kTile * kTile / 2; i += kThreads) {
    const int token = blockIdx.x * kTile + i / (kTile / 2);
    const int column = blockIdx.y * kTile + i % (kTile / 2) * 2;
    if (token >= p.result.n || column >= p.result.out) continue;
    const H* x = static_cast<const H*>(p.x) + token * p.x_stride;
    const H* w = static_cast<const H*>(p.w) + static_cast<int64>(column) * p.stride;
    const H* next = column + 1 < p.result.out ? w + p.stride : w;
    float a = 0, b = 0;
    for (int k = 0; k < p.in; ++k) {
      a += to_float(x[k]) * to_float(w[k]);
      b += to_float(x[k]) * to_float(next[k]);
    }
    finish_pair(p.result, token, column, a, b);
  }
}

#endif

}  // namespace qvl::cuda
