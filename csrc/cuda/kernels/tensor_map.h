// Descriptor of a tensor for the copy engine of sm_90 and newer. Plain types only.
#pragma once

namespace qvl::cuda {

// Written by the driver's cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

}  // namespace qvl::cuda
