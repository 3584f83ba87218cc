// Parameters of convert.cu, for host and device.
#pragma once

namespace qvl::cuda {

struct ToHalf {
  const void* x;  // float32 [n]
  void* y;        // H [n]
  long long n;
};

}  // namespace qvl::cuda
