// Conversion of float32 [n] to H [n]: of patch features before the resampler's projection, and of the
// matrices of adapters.
//
// Layout: a thread converts 8 adjacent values, with two float4 loads and one 16-byte store.
//
// Cost. Bytes: 4 read and 2 written per value; memory-bound, time = 6 * n / bandwidth.
//
// Reference: the golden image features, tests/csrc/test_golden_gpu.py; adapters against merged weights,
// tests/csrc/test_engine_adapters.py.
#include "cuda/kernels/common.cuh"
#include "cuda/kernels/convert.h"

using namespace qvl::cuda;

extern "C" __global__ void to_half_8(const __grid_constant__ ToHalf p) {
  const int64 i = (static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  wait_for_predecessors();
  start_successors();
  const float* x = static_cast<const float*>(p.x);
  H* y = static_cast<H*>(p.y);
  if (i + 8 <= p.n) {
    const float4 a = reinterpret_cast<const float4*>(x + i)[0], b = reinterpret_cast<const float4*>(x + i)[1];
    H2 packed[4] = {to_half2(a.x, a.y), to_half2(a.z, a.w), to_half2(b.x, b.y), to_half2(b.z, b.w)};
    *reinterpret_cast<uint4*>(y + i) = *reinterpret_cast<uint4*>(packed);
  } else {
    for (int64 j = i; j < p.n; ++j) y[j] = to_half(x[j]);
  }
}
