// C interface to the versions of csrc/textbook, for the tests and benchmarks/textbook.py. Versions are
// numbered from 0, which is "v1". Functions with an ISA return 0, or 1 on failure, as when this processor
// lacks it.
#include "textbook/versions.h"

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "core/pack.h"
#include "cpu/dispatch.h"

using namespace qvl;
using namespace qvl::cpu;
using namespace qvl::textbook;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const Versions& versions_for(qvl_isa isa) {
  switch (kernels_for(isa).isa) {
#if defined(__x86_64__)
#ifndef QVL_WITHOUT_AVX2
    case QVL_ISA_AVX2:
      return *avx2_versions();
#endif
#ifndef QVL_WITHOUT_AVX512
    case QVL_ISA_AVX512:
      return *avx512_versions();
#endif
#ifndef QVL_WITHOUT_AVX512_BF16
    case QVL_ISA_AVX512_BF16:
      return *avx512_bf16_versions();
#endif
#endif
    default:
      return *generic_versions();
  }
}

// Call `body`; return 0, or 1 if it throws, as it does if this processor lacks the ISA.
template <typename Body>
int status_of(Body&& body) {
  return guarded(nullptr, body) == QVL_OK ? 0 : 1;
}

}  // namespace

// Name of a version; NULL after the last one. kernel: 0 matvec_bf16, 1 matvec_int4, 2 attention.
EXPORT const char* qvlt_textbook_name(int kernel, int version) {
  const Versions& tables = *generic_versions();
  return kernel == 0   ? tables.matvec_bf16[version].name
         : kernel == 1 ? tables.matvec_int4[version].name
                       : tables.attention[version].name;
}

// dtype: QVL_BFLOAT16 or QVL_INT4_G128
EXPORT int qvlt_textbook_matvec(qvl_isa isa, int version, qvl_dtype dtype, int64_t rows, int64_t k,
                                const float* x, const void* packed, float* y) {
  return status_of([&] {
    const Versions& tables = versions_for(isa);
    const auto width = static_cast<int>(k);
    std::vector<char> scratch(
        std::max(kernels_for(isa).prepared_bytes[dtype](width, 1), size_t(padded(k)) * sizeof(float)));
    const void* scales = static_cast<const char*>(packed) + value_bytes(dtype, rows, k);
    const auto& versions = dtype == QVL_BFLOAT16 ? tables.matvec_bf16 : tables.matvec_int4;
    versions[version].run({packed, scales, x, rows, width, scratch.data(), y});
  });
}

// q and out [heads][head_dim]; cache bfloat16 [blocks][2][heads][block_tokens][head_dim], as in
// cpu/kv_pool.h.
EXPORT int qvlt_textbook_attention(qvl_isa isa, int version, int heads, int head_dim, int n_keys,
                                   int block_tokens, const float* q, const uint16_t* cache, float* out) {
  return status_of([&] {
    const auto run = versions_for(isa).attention[version].run;
    const int64_t head_stride = int64_t{block_tokens} * head_dim;
    std::vector<float> scratch(static_cast<size_t>(n_keys + head_dim + 16));
    std::vector<KvTile> tiles;
    for (int head = 0; head < heads; ++head, q += head_dim, out += head_dim) {
      tiles.clear();
      for (int first = 0; first < n_keys; first += block_tokens) {
        const uint16_t* keys = cache + (int64_t{2} * heads * (first / block_tokens) + head) * head_stride;
        tiles.push_back({keys, keys + heads * head_stride, head_dim, QVL_BFLOAT16,
                         std::min(block_tokens, n_keys - first), nullptr, nullptr});
      }
      run({q, head_dim, tiles.data(), static_cast<int>(tiles.size()), scratch.data(), out});
    }
  });
}
