// The numbered versions of three CPU kernels as tables of functions, one table per ISA; see README.md.
#pragma once

#include "cpu/kernels/table.h"

namespace qvl::textbook {

// y [rows] = weights [rows][k] * x [k]
struct Product {
  const void* weights;  // bfloat16 [rows][k], or int4 as in qwenvl.h
  const void* scales;   // int4: bfloat16 [rows][ceil(k / 128)]
  const float* x;
  int64_t rows;
  int k;
  // At least prepared_bytes of the production kernel (Kernels in cpu/kernels/table.h), and at least k floats,
  // with k rounded up to a multiple of 128.
  void* scratch;
  float* y;
};

// out [head_dim] = softmax(q . keys) . values, for one query and one head; the caller has scaled q. The keys
// and values are bfloat16; a tile has those of one block of a KV cache.
struct Query {
  const float* q;
  int head_dim;
  const cpu::KvTile* tiles;
  int n_tiles;
  // At least (number of keys) + head_dim + 16 floats: for the scores of v1, or the sums of v3 to v6 in whole
  // vectors of up to 16 lanes.
  float* scratch;
  float* out;
};

template <typename Arguments>
struct Version {
  const char* name;  // such as "v2 vectors": the number, from 1 on, and the new idea
  void (*run)(const Arguments& arguments);
};

constexpr int kMaxVersions = 8;

// Versions from the textbook loop to the production kernel; entries after the last one are NULL.
struct Versions {
  Version<Product> matvec_bf16[kMaxVersions];
  Version<Product> matvec_int4[kMaxVersions];
  Version<Query> attention[kMaxVersions];
};

const Versions* generic_versions();
const Versions* avx2_versions();
const Versions* avx512_versions();
const Versions* avx512_bf16_versions();

}  // namespace qvl::textbook
