#include "cpu/adapter.h"

#include <cstring>

#include "core/pack.h"

namespace qvl::cpu {

CpuAdapter::CpuAdapter(const Kernels& kernels, int layers, const std::vector<AdapterMatrix>& matrices)
    : targets_(size(int64_t{layers} * kLayerTargets + 1)) {
  for (const AdapterMatrix& m : matrices) {
    // Pad the rows of B to full vectors, because the kernels take a slower path for a remainder, and the rows
    // are short. A vector of bfloat16 contains two values per lane.
    const int64_t unit = int64_t{kernels.lanes} * (m.dtype == QVL_BFLOAT16 ? 2 : 1);
    const int64_t width = (m.rank + unit - 1) / unit * unit;
    LowRank& target = targets_[size(m.target)];
    target.a = copy(m.dtype, m.rank, m.in, m.in, m.a);
    target.b = copy(m.dtype, m.out, m.rank, width, m.b);
    target.scale = m.scale;
  }
}

Matrix CpuAdapter::copy(qvl_dtype dtype, int64_t rows, int64_t columns, int64_t width, const void* values) {
  const size_t from = value_bytes(dtype, 1, columns), to = value_bytes(dtype, 1, width);
  memory_.emplace_back(to * size(rows));
  char* const memory = memory_.back().get<char>(to * size(rows));
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(memory + to * size(i), static_cast<const char*>(values) + from * size(i), from);
    std::memset(memory + to * size(i) + from, 0, to - from);
  }
  return Matrix::stored(dtype, rows, width, memory);
}

void add_low_rank(Context& context, const std::vector<AdapterRows>& runs, int64_t target, const float* x,
                  int64_t x_stride, float* y, int64_t y_stride, Buffer& scratch) {
  for (const AdapterRows& run : runs) {
    const LowRank* const m = run.adapter->target(target);
    if (m == nullptr) continue;
    const Rows rows = run.decode ? Rows{0, run.n} : Rows{run.n, 0};
    const int64_t width = m->b.k;
    auto* low = scratch.get<float>(size(run.n * width));
    // A has fewer rows than `low` has columns if B is padded; linear() does not write the padding.
    std::memset(low, 0, size(run.n * width) * sizeof(float));
    linear(context, m->a, x + run.first * x_stride, x_stride, rows, low, width);
    for (int64_t i = 0; i < run.n * width; ++i) low[i] *= m->scale;
    linear(context, m->b, low, width, rows, y + run.first * y_stride, y_stride, /*add=*/true);
  }
}

}  // namespace qvl::cpu
