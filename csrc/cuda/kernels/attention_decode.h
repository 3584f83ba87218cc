// Parameters of attention_decode.cu, shared by host and device. H: the compute type, bfloat16 or float16.
#pragma once

namespace qvl::cuda {

struct AttentionDecode {
  const void* q;            // H [n][heads][head_dim], rotated and scaled; NULL: qkv is given
  const void* qkv;          // H [n][3][heads][head_dim], to be rotated and stored; NULL: q is given
  const int* positions;     // [n]
  const int* angle_tables;  // [n]: index of the row's table in cos and sin
  const int* tables;        // [n]: index of the row's sequence in `blocks`; NULL: row i has sequence i
  const int* blocks;        // [sequences][max_blocks]: block tables
  const float* cos;         // [tables][max_positions][head_dim / 2], as sin; used with qkv only
  const float* sin;
  const float* query_scale;  // [max_positions]; used with qkv only
  char* base;                // base, block_bytes: see KvLayer in ops.h
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
  // Results of the chunks; scores are multiplied by log2(e).
  float* sums;   // [n][heads][chunks][head_dim]: sums of exp2(score - maximum) * value
  float* parts;  // [n][heads][chunks][2]: maximum of the scores, sum of exp2(score - maximum)
  void* y;       // H [n][heads][head_dim]
};

}  // namespace qvl::cuda
