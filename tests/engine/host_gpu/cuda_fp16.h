// The parts of cuda_fp16.h that the kernels in the linear_decode.cc of this folder use, for a C++ compiler
// (tests/engine/test_hopper_products.py). The kernels compute in bfloat16, and only convert float16 values of
// files (upload_matrix.cu).
#pragma once

#include <cstring>

struct __half {
  unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) {
  return {bits};
}
inline float __half2float(__half value) {
  _Float16 number;
  std::memcpy(&number, &value, 2);
  return number;
}
