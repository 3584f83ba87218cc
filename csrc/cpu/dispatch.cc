#include "cpu/dispatch.h"

#include "core/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qvl::cpu {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports of GCC 10 does not support F16C.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// Whether this processor supports the ISA.
bool is_supported(qvl_isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case QVL_ISA_GENERIC:
      return true;
    case QVL_ISA_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case QVL_ISA_AVX512:
      return is_supported(QVL_ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    case QVL_ISA_AVX512_BF16:
      return is_supported(QVL_ISA_AVX512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vbmi");
    default:
      return false;
  }
#else
  return isa == QVL_ISA_GENERIC;
#endif
}

// Kernels of an ISA; NULL if the build omits the ISA. A build for a single machine omits the ISAs that the
// machine does not need.
const Kernels* compiled_kernels(qvl_isa isa) {
  switch (isa) {
    case QVL_ISA_GENERIC:
      return generic_kernels();
#if defined(__x86_64__)
#ifndef QVL_WITHOUT_AVX2
    case QVL_ISA_AVX2:
      return avx2_kernels();
#endif
#ifndef QVL_WITHOUT_AVX512
    case QVL_ISA_AVX512:
      return avx512_kernels();
#endif
#ifndef QVL_WITHOUT_AVX512_BF16
    case QVL_ISA_AVX512_BF16:
      return avx512_bf16_kernels();
#endif
#endif
    default:
      return nullptr;
  }
}

}  // namespace

const char* isa_name(qvl_isa isa) {
  static const char* const names[] = {"best", "generic", "avx2", "avx512", "avx512_bf16"};
  return names[isa];
}

const Kernels& kernels_for(qvl_isa isa) {
  if (isa == QVL_ISA_BEST) {
    isa = QVL_ISA_AVX512_BF16;
    while (!is_supported(isa) || compiled_kernels(isa) == nullptr) --isa;
  }
  QVL_REQUIRE(is_supported(isa), QVL_UNSUPPORTED, "config: this processor has no %s instructions",
              isa_name(isa));
  const Kernels* table = compiled_kernels(isa);
  QVL_REQUIRE(table != nullptr, QVL_UNSUPPORTED, "config: this build has no kernels for %s", isa_name(isa));
  return *table;
}

}  // namespace qvl::cpu
