#include "core/adapter.h"

#include <cmath>
#include <string>
#include <unordered_map>

#include "core/config.h"
#include "core/error.h"
#include "core/pack.h"
#include "core/weights.h"

namespace qvl {
namespace {

// Index and spec of each target matrix, by name.
std::unordered_map<std::string, std::pair<int64_t, WeightSpec>> adapter_targets(qvl_config config) {
  config.stages = QVL_STAGE_LANGUAGE;
  std::unordered_map<std::string, std::pair<int64_t, WeightSpec>> result;
  int64_t n = 0;
  // Without the vision stage weight_specs lists the matrices in the order of LayerTarget, lm_head last.
  for (const WeightSpec& spec : weight_specs(config)) {
    if (spec.product) result.emplace(spec.name, std::make_pair(n++, spec));
  }
  return result;
}

// Check that A or B (`which`) is not NULL, is aligned and has only finite values. `floats`: scratch memory.
void check_values(const char* name, const char* which, qvl_dtype dtype, int64_t rows, int64_t columns,
                  const void* values, std::vector<float>& floats) {
  QVL_REQUIRE(values != nullptr, QVL_BAD_WEIGHT, "%s: %s is NULL", name, which);
  const uintptr_t alignment = dtype == QVL_FLOAT32 ? 4 : 2;
  QVL_REQUIRE(reinterpret_cast<uintptr_t>(values) % alignment == 0, QVL_BAD_WEIGHT,
              "%s: %s is not aligned to %d bytes", name, which, static_cast<int>(alignment));
  floats.resize(static_cast<size_t>(rows * columns));
  unpack(dtype, rows, columns, values, floats.data());
  for (const float value : floats) {
    QVL_REQUIRE(std::isfinite(value), QVL_BAD_WEIGHT, "%s: %s has a value that is not finite", name, which);
  }
}

}  // namespace

std::vector<AdapterMatrix> checked_adapter(const qvl_config& config, const qvl_adapter_matrix* matrices,
                                           int64_t n) {
  QVL_REQUIRE(has_language(config), QVL_INVALID, "adapter: the engine has no language stage");
  const auto targets = adapter_targets(config);
  std::vector<bool> seen(targets.size());
  std::vector<AdapterMatrix> result;
  std::vector<float> floats;
  for (int64_t i = 0; i < n; ++i) {
    const qvl_adapter_matrix& m = matrices[i];
    QVL_REQUIRE(m.name != nullptr, QVL_INVALID, "matrices[%lld]: name is NULL", static_cast<long long>(i));
    const auto found = targets.find(m.name);
    QVL_REQUIRE(found != targets.end(), QVL_BAD_WEIGHT,
                "%.200s: no such matrix; an adapter changes attn.c_attn, attn.c_proj, mlp.w1, mlp.w2 and "
                "mlp.c_proj of a layer, and lm_head",
                m.name);
    const auto& [target, spec] = found->second;
    const char* const name = spec.name.c_str();
    QVL_REQUIRE(!seen[static_cast<size_t>(target)], QVL_BAD_WEIGHT, "%s: is given twice", name);
    seen[static_cast<size_t>(target)] = true;
    QVL_REQUIRE(is_float(m.dtype), QVL_BAD_WEIGHT,
                "%s: A and B are %s; they must be float32, bfloat16 or float16", name, dtype_name(m.dtype));
    QVL_REQUIRE(m.rank >= 1, QVL_BAD_WEIGHT, "%s: rank is %lld; it must be at least 1", name,
                static_cast<long long>(m.rank));
    QVL_REQUIRE(m.out == spec.shape[0] && m.in == spec.shape[1], QVL_BAD_WEIGHT,
                "%s: B A is [%lld, %lld]; the matrix is [%lld, %lld]", name, static_cast<long long>(m.out),
                static_cast<long long>(m.in), static_cast<long long>(spec.shape[0]),
                static_cast<long long>(spec.shape[1]));
    QVL_REQUIRE(packed_bytes(m.dtype, m.rank, m.in) != 0 && packed_bytes(m.dtype, m.out, m.rank) != 0,
                QVL_BAD_WEIGHT, "%s: rank is %lld; it is too large", name, static_cast<long long>(m.rank));
    QVL_REQUIRE(std::isfinite(m.scale), QVL_BAD_WEIGHT, "%s: its scale is not finite", name);
    check_values(name, "A", m.dtype, m.rank, m.in, m.a, floats);
    check_values(name, "B", m.dtype, m.out, m.rank, m.b, floats);
    result.push_back({target, m.dtype, m.out, m.in, m.rank, m.a, m.b, m.scale});
  }
  return result;
}

}  // namespace qvl
