// Parameters of attention_decode.cu, shared by host and device.
#pragma once

namespace qvl::cuda {

struct AttentionDecode {
  const void* q;    // H [n][heads][head_dim]; NULL: the kernel rotates and stores qkv
  const void* qkv;  // H [n][3][heads][head_dim], not yet rotated, keys and values not yet stored
  const int* positions;
  const int* angle_tables;
  const int* tables;  // [n]: index of the row's sequence in `blocks`; NULL: row i has sequence i
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
  int chunks;  // maximum number of chunks of 128 keys that a row has
  // Whether positions, block tables, and the keys and values of earlier tokens may be read before the
  // preceding kernels end, because these kernels write only qkv, or only q and the newest keys and values.
  int early;
  // [n][heads]: number of finished blocks (of threads), zero before and after the kernel. NULL: the kernel
  // attention_decode_combine merges the chunks.
  unsigned* counters;
  float* sums;   // [n][heads][chunks][head_dim]: sums of exp2(score - maximum) * value
  float* parts;  // [n][heads][chunks][2]: maximum of the scores, sum of exp2(score - maximum)
  void* y;
};

}  // namespace qvl::cuda
