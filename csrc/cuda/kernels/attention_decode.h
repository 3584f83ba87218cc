// Parameters of attention_decode.cu, shared by host and device.
#pragma once

namespace qvl::cuda {

struct AttentionDecode {
  const void* q;    // H [n][heads][head_dim]; NULL: the kernel rotates and stores qkv
  const void* qkv;  // H [n][3][heads][head_dim], not yet rotated, keys and values not yet stored
  const int* positions;
  const int* angle_tables;
  const int* tables;  // NULL: row i has table i
  const int* blocks;
  const float* cos;
  const float* sin;
  const float* query_scale;
  char* base;
  unsigned long long block_bytes;
  int max_positions;
  int max_blocks;
  int block_tokens;
  int heads, head_dim;
  int chunks;  // number of chunks of the longest sequence
  int early;   // whether the preceding kernels write only q or qkv, and with q the newest keys
  // [n][heads]: number of finished blocks, zero before and after. NULL: another kernel merges the chunks.
  unsigned* counters;
  float* sums;   // [n][heads][chunks][head_dim]: of exp2(score - most) * value
  float* parts;  // [n][heads][chunks][2]: (most, sum of exp2(score - most))
  void* y;
};

}  // namespace qvl::cuda
