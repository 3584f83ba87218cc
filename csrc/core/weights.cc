#include "core/weights.h"

#include <cstring>

#include "core/config.h"
#include "core/error.h"
#include "core/pack.h"

namespace qvl {
namespace {

// List of specs under construction. table(): a tensor that must be stored as floats; matrix(): one that may
// be quantized.
struct Specs {
  std::vector<WeightSpec> list;

  void table(const std::string& name, std::vector<int64_t> shape) {
    list.push_back({name, std::move(shape), /*product=*/false});
  }
  void matrix(const std::string& name, int64_t out, int64_t in) {
    list.push_back({name, {out, in}, /*product=*/true});
  }
  void norm(const std::string& name, int64_t width) {
    table(name + ".weight", {width});
    table(name + ".bias", {width});
  }
  void linear(const std::string& name, int64_t out, int64_t in) {
    matrix(name + ".weight", out, in);
    table(name + ".bias", {out});
  }
};

// The weights listed at qvl_tensor in qwenvl.h; artifact/weights.py of the package has the same list.
void language_specs(const qvl_config& c, Specs& specs) {
  const int64_t hidden = c.hidden, mlp = c.mlp_width;
  specs.table("wte.weight", {c.vocab, hidden});
  for (int i = 0; i < c.layers; ++i) {
    const std::string layer = "h." + std::to_string(i) + ".";
    specs.table(layer + "ln_1.weight", {hidden});
    specs.linear(layer + "attn.c_attn", 3 * hidden, hidden);
    specs.matrix(layer + "attn.c_proj.weight", hidden, hidden);
    specs.table(layer + "ln_2.weight", {hidden});
    specs.matrix(layer + "mlp.w1.weight", mlp, hidden);
    specs.matrix(layer + "mlp.w2.weight", mlp, hidden);
    specs.matrix(layer + "mlp.c_proj.weight", hidden, mlp);
  }
  specs.table("ln_f.weight", {hidden});
  specs.matrix("lm_head.weight", c.vocab, hidden);
}

void vision_specs(const qvl_config& c, Specs& specs) {
  const int64_t width = c.vision_width, mlp = c.vision_mlp_width, out = c.hidden;
  specs.list.push_back({"visual.conv1.weight", {width, 3, c.patch_size, c.patch_size}, /*product=*/true});
  specs.table("visual.positional_embedding", {patches(c), width});
  specs.norm("visual.ln_pre", width);
  for (int i = 0; i < c.vision_layers; ++i) {
    const std::string block = "visual.transformer.resblocks." + std::to_string(i) + ".";
    specs.norm(block + "ln_1", width);
    specs.linear(block + "attn.in_proj", 3 * width, width);
    specs.linear(block + "attn.out_proj", width, width);
    specs.norm(block + "ln_2", width);
    specs.linear(block + "mlp.c_fc", mlp, width);
    specs.linear(block + "mlp.c_proj", width, mlp);
  }
  const std::string pool = "visual.attn_pool.";
  if (width != out) specs.matrix(pool + "kv_proj.weight", out, width);
  specs.norm(pool + "ln_kv", out);
  specs.table(pool + "query", {c.n_queries, out});
  specs.norm(pool + "ln_q", out);
  specs.table(pool + "pos_embed", {c.n_queries, out});
  specs.table(pool + "key_pos_embed", {patches(c), out});
  specs.matrix(pool + "attn.in_proj_weight", 3 * out, out);
  specs.table(pool + "attn.in_proj_bias", {3 * out});
  specs.linear(pool + "attn.out_proj", out, out);
  specs.norm("visual.ln_post", out);
  specs.matrix("visual.proj", out, out);
}

std::string shape_text(const int64_t* shape, size_t n) {
  std::string text = "[";
  for (size_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void check_tensor(const qvl_tensor& tensor, const WeightSpec& spec, qvl_device device) {
  const char* name = spec.name.c_str();
  QVL_REQUIRE(tensor.dtype >= 0 && tensor.dtype < QVL_DTYPES, QVL_BAD_WEIGHT, "%s: dtype %d is unknown", name,
              tensor.dtype);
  QVL_REQUIRE(is_float(tensor.dtype) || (spec.product && is_quantized(tensor.dtype)), QVL_BAD_WEIGHT,
              "%s: is %s; this weight must be float32, bfloat16 or float16%s", name, dtype_name(tensor.dtype),
              spec.product ? ", or quantized" : "");
  QVL_REQUIRE(tensor.n_dims >= 1 && tensor.n_dims <= 4, QVL_BAD_WEIGHT, "%s: has %d axes; it must have %zu",
              name, tensor.n_dims, spec.shape.size());
  const auto n_dims = static_cast<size_t>(tensor.n_dims);
  const bool same_shape = n_dims == spec.shape.size() &&
                          std::memcmp(tensor.shape, spec.shape.data(), n_dims * sizeof(int64_t)) == 0;
  QVL_REQUIRE(same_shape, QVL_BAD_WEIGHT, "%s: shape is %s; it must be %s", name,
              shape_text(tensor.shape, n_dims).c_str(),
              shape_text(spec.shape.data(), spec.shape.size()).c_str());
  const uint64_t bytes = stored_bytes(tensor.dtype, spec.shape);
  QVL_REQUIRE(tensor.bytes == bytes, QVL_BAD_WEIGHT, "%s: has %llu bytes; %s %s has %llu", name,
              static_cast<unsigned long long>(tensor.bytes), dtype_name(tensor.dtype),
              shape_text(spec.shape.data(), spec.shape.size()).c_str(),
              static_cast<unsigned long long>(bytes));
  QVL_REQUIRE(tensor.data != nullptr, QVL_BAD_WEIGHT, "%s: data is NULL", name);
  const bool is_16_bit = tensor.dtype == QVL_BFLOAT16 || tensor.dtype == QVL_FLOAT16;
  // A back end may use these where they are, without a copy (qvl_tensor in qwenvl.h).
  const bool in_place = spec.product || spec.name == "wte.weight";
  const uintptr_t alignment = in_place ? 16 : is_16_bit ? 2 : 4;
  QVL_REQUIRE(reinterpret_cast<uintptr_t>(tensor.data) % alignment == 0, QVL_BAD_WEIGHT,
              "%s: data is not aligned to %d bytes", name, static_cast<int>(alignment));
  QVL_REQUIRE(tensor.device == QVL_DEVICE_CPU || tensor.device == device, QVL_BAD_WEIGHT,
              "%s: is on device %d; this engine takes weights on the CPU or on its own device", name,
              tensor.device);
}

// Check that a matrix's column order is a permutation of 0 to n - 1.
void check_order(const qvl_tensor& tensor, const std::string& name, int64_t n) {
  const char* const text = name.c_str();
  QVL_REQUIRE(tensor.dtype == QVL_INT32 && tensor.n_dims == 1 && tensor.shape[0] == n &&
                  tensor.bytes == static_cast<uint64_t>(n) * sizeof(int32_t),
              QVL_BAD_WEIGHT, "%s: must be int32 [%lld]", text, static_cast<long long>(n));
  QVL_REQUIRE(tensor.data != nullptr, QVL_BAD_WEIGHT, "%s: data is NULL", text);
  QVL_REQUIRE(reinterpret_cast<uintptr_t>(tensor.data) % alignof(int32_t) == 0, QVL_BAD_WEIGHT,
              "%s: data is not aligned to 4 bytes", text);
  QVL_REQUIRE(tensor.device == QVL_DEVICE_CPU, QVL_BAD_WEIGHT, "%s: is on device %d; it must be on the CPU",
              text, tensor.device);
  const auto* order = static_cast<const int32_t*>(tensor.data);
  std::vector<bool> seen(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    QVL_REQUIRE(order[i] >= 0 && order[i] < n && !seen[static_cast<size_t>(order[i])], QVL_BAD_WEIGHT,
                "%s: is not a permutation of the %lld inputs; value %lld is %d", text,
                static_cast<long long>(n), static_cast<long long>(i), order[i]);
    seen[static_cast<size_t>(order[i])] = true;
  }
}

}  // namespace

const char* dtype_name(qvl_dtype dtype) {
  static const char* const names[QVL_DTYPES] = {"float32",
                                                "bfloat16",
                                                "int8",
                                                "int4 (groups of 64)",
                                                "int4 (groups of 128)",
                                                "float16",
                                                "uint4 (groups of 32 with zero points)",
                                                "uint4 (groups of 64 with zero points)",
                                                "uint4 (groups of 128 with zero points)",
                                                "uint8 (groups of 32 with zero points)",
                                                "uint8 (groups of 64 with zero points)",
                                                "uint8 (groups of 128 with zero points)",
                                                "int32"};
  return dtype >= 0 && dtype < QVL_DTYPES ? names[dtype] : "unknown";
}

uint64_t stored_bytes(qvl_dtype dtype, const std::vector<int64_t>& shape) {
  int64_t inner = 1;
  for (size_t i = 1; i < shape.size(); ++i) inner *= shape[i];
  return packed_bytes(dtype, shape[0], inner);
}

std::vector<WeightSpec> weight_specs(const qvl_config& config) {
  Specs specs;
  if (has_language(config)) language_specs(config, specs);
  if (has_vision(config)) vision_specs(config, specs);
  return std::move(specs.list);
}

WeightTable checked_weights(const qvl_config& config, const Tensors& tensors) {
  WeightTable table;
  for (const WeightSpec& spec : weight_specs(config)) {
    const qvl_tensor* tensor = tensors.find(spec.name);
    QVL_REQUIRE(tensor != nullptr, QVL_BAD_WEIGHT, "%s: this weight is missing", spec.name.c_str());
    check_tensor(*tensor, spec, config.device);
    table.emplace(spec.name, *tensor);
    const qvl_tensor* order = spec.product ? tensors.find(spec.name + ".order") : nullptr;
    if (order == nullptr) continue;
    int64_t inner = 1;
    for (size_t i = 1; i < spec.shape.size(); ++i) inner *= spec.shape[i];
    check_order(*order, spec.name + ".order", inner);
    table.emplace(spec.name + ".order", *order);
  }
  return table;
}

}  // namespace qvl
