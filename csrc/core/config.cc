#include "core/config.h"

#include <cmath>

#include "core/error.h"
#include "core/structs.h"

namespace qvl {
namespace {

constexpr int kMaxSize = 1 << 20;  // maximum of the widths and of max_tokens

void in_range(const char* name, int64_t value, int64_t minimum, int64_t maximum) {
  QVL_REQUIRE(value >= minimum && value <= maximum, QVL_INVALID,
              "config: %s is %lld; it must be %lld to %lld", name, static_cast<long long>(value),
              static_cast<long long>(minimum), static_cast<long long>(maximum));
}

void check_language(const qvl_config& c) {
  in_range("layers", c.layers, 1, 4096);
  in_range("heads", c.heads, 1, 4096);
  in_range("head_dim", c.head_dim, 2, 512);
  QVL_REQUIRE(c.head_dim % 2 == 0, QVL_INVALID, "config: head_dim is %d; it must be even", c.head_dim);
  QVL_REQUIRE(int64_t{c.heads} * c.head_dim == c.hidden, QVL_INVALID,
              "config: heads (%d) x head_dim (%d) must equal hidden (%d)", c.heads, c.head_dim, c.hidden);
  in_range("mlp_width", c.mlp_width, 1, kMaxSize);
  in_range("vocab", c.vocab, 1, 1 << 24);
  QVL_REQUIRE(c.norm_epsilon > 0 && c.norm_epsilon < 1, QVL_INVALID,
              "config: norm_epsilon is %g; it must be between 0 and 1", static_cast<double>(c.norm_epsilon));
  // At least 2, because logn divides by log(seq_length).
  in_range("seq_length", c.seq_length, 2, 1 << 24);
  in_range("max_positions", c.max_positions, 1, 1 << 24);
  QVL_REQUIRE(c.rotary_base > 1 && std::isfinite(c.rotary_base), QVL_INVALID,
              "config: rotary_base is %g; it must be over 1", static_cast<double>(c.rotary_base));
  in_range("dynamic_ntk", c.dynamic_ntk, 0, 1);
  in_range("logn", c.logn, 0, 1);
}

void check_vision(const qvl_config& c) {
  in_range("image_size", c.image_size, 1, 1 << 14);
  in_range("patch_size", c.patch_size, 1, 1 << 10);
  QVL_REQUIRE(c.image_size % c.patch_size == 0, QVL_INVALID,
              "config: image_size (%d) must be a multiple of patch_size (%d)", c.image_size, c.patch_size);
  in_range("patches of an image", patches(c), 1, 1 << 16);
  in_range("vision_width", c.vision_width, 1, kMaxSize);
  in_range("vision_layers", c.vision_layers, 1, 4096);
  in_range("vision_heads", c.vision_heads, 1, 4096);
  QVL_REQUIRE(c.vision_width % c.vision_heads == 0, QVL_INVALID,
              "config: vision_width (%d) must be a multiple of vision_heads (%d)", c.vision_width,
              c.vision_heads);
  in_range("vision_width / vision_heads", c.vision_width / c.vision_heads, 1, 512);
  in_range("vision_mlp_width", c.vision_mlp_width, 1, kMaxSize);
  in_range("n_queries", c.n_queries, 1, 1 << 16);
  QVL_REQUIRE(c.hidden % kResamplerHeadDim == 0, QVL_INVALID,
              "config: hidden is %d; with vision it must be a multiple of %d", c.hidden, kResamplerHeadDim);
}

}  // namespace

qvl_config checked_config(const qvl_config* config) {
  qvl_config c = converted("config", config);
  constexpr uint32_t kStages = QVL_STAGE_VISION | QVL_STAGE_LANGUAGE;
  QVL_REQUIRE(c.stages != 0 && (c.stages & ~kStages) == 0, QVL_INVALID,
              "config: stages is %u; it must be QVL_STAGE_VISION, QVL_STAGE_LANGUAGE or both", c.stages);
  in_range("device", c.device, QVL_DEVICE_CPU, QVL_DEVICE_CUDA);
  in_range("device_index", c.device_index, 0, 1024);
  in_range("n_threads", c.n_threads, 0, 1024);
  in_range("isa", c.isa, QVL_ISA_BEST, QVL_ISA_AVX512_BF16);
  in_range("max_tokens", c.max_tokens, 0, kMaxSize);
  in_range("compute", c.compute, QVL_COMPUTE_BEST, QVL_COMPUTE_FLOAT16);
  in_range("hidden", c.hidden, 1, kMaxSize);
  if (has_language(c)) check_language(c);
  if (has_vision(c)) check_vision(c);
  if (c.max_tokens == 0) c.max_tokens = c.device == QVL_DEVICE_CUDA ? 2048 : 512;
  return c;
}

uint64_t kv_block_bytes(const qvl_config& c, int32_t block_tokens, qvl_dtype dtype) {
  const uint64_t element = dtype == QVL_FLOAT32 ? 4 : dtype == QVL_INT8 ? 1 : 2;
  const uint64_t scale = dtype == QVL_INT8 ? sizeof(float) : 0;
  // Bytes of the keys, or of the values, of one token and head.
  const uint64_t token = static_cast<uint64_t>(c.head_dim) * element + scale;
  return 2 * static_cast<uint64_t>(c.layers) * static_cast<uint64_t>(c.heads) *
         static_cast<uint64_t>(block_tokens) * token;
}

}  // namespace qvl
