// The parts of cuda_fp16.h that the kernels in the linear_decode.cc of this folder use. They compute in
// bfloat16, and only convert float16 values to float32: those of files (upload_matrix.cu), and the scales of
// weights with zero points (quantized.cuh).
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
