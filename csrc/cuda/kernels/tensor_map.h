// Descriptor of a tensor for Hopper's copy engine (newer GPUs have one as well, but no kernel uses it there).
// Built-in types only: NVRTC, which also compiles this header, has no standard library.
#pragma once

namespace qvl::cuda {

// The descriptor, written by cuTensorMapEncodeTiled of the driver (cuda/tensor_map.cc).
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

}  // namespace qvl::cuda
