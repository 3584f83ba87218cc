// Parameters of attention_decode.cu, shared by host and device.
#pragma once

namespace qvl::cuda {

struct AttentionDecode {
  const void* q;
  const int* positions;
  const int* tables;
  const int* blocks;
  int max_blocks;
  int block_tokens;
  const char* base;
  unsigned long long block_bytes;
  int heads, head_dim;
  int chunks;    // that the sequence of most keys has
  float* sums;   // [n][heads][chunks][head_dim]: of exp2(score - most) * value
  float* parts;  // [n][heads][chunks][2]: most, and the sum of exp2(score - most)
  void* y;
};

}  // namespace qvl::cuda
