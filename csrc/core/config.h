// The checked config and sizes derived from it.
#pragma once

#include "qwenvl.h"

namespace qvl {

constexpr int kResamplerHeadDim = 128;  // upstream's resampler has hidden / 128 heads
constexpr int kMaxBlockTokens = 256;    // maximum number of tokens of a KV block

// Copy of the caller's config, which may be of any version of the struct, after a check of its fields, except
// those of an absent stage. A max_tokens of 0 is replaced by the device's default. Throws QVL_INVALID. Back
// ends have further limits.
qvl_config checked_config(const qvl_config* config);

inline bool has_vision(const qvl_config& c) {
  return (c.stages & QVL_STAGE_VISION) != 0;
}
inline bool has_language(const qvl_config& c) {
  return (c.stages & QVL_STAGE_LANGUAGE) != 0;
}

// Bytes of a KV block: keys and values of its tokens in all layers, with the scales of QVL_INT8.
uint64_t kv_block_bytes(const qvl_config& config, int32_t block_tokens, qvl_dtype dtype);

// Number of patches of an image.
inline int patches(const qvl_config& c) {
  const int grid = c.image_size / c.patch_size;
  return grid * grid;
}

}  // namespace qvl
