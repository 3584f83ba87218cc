// Parameters of convert.cu, for host and device. H: the compute type, bfloat16 or float16.
#pragma once

namespace qvl::cuda {

struct ToHalf {
  const void* x;  // float32 [n]
  void* y;        // H [n]
  long long n;
};

}  // namespace qvl::cuda
