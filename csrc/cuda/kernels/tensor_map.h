// A tensor as the copy engine of sm_90 and newer knows it. Plain types only.
#pragma once

namespace qvl::cuda {

// What the driver's cuTensorMapEncodeTiled writes.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

}  // namespace qvl::cuda
