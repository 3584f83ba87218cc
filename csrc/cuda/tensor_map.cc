#include "cuda/tensor_map.h"

#include <algorithm>

#include "core/error.h"

namespace qvl::cuda {

bool has_tensor_maps(const Gpu& gpu) {
  return gpu.arch() == 90;
}

TensorMap tensor_map(const Gpu& gpu, const void* base, std::initializer_list<int64_t> sizes,
                     std::initializer_list<int64_t> strides, std::initializer_list<int> box, bool swizzled) {
  // Constants of the driver's interface.
  constexpr int kFloat16 = 6, kBfloat16 = 9, kSwizzle128 = 3, kL2Lines256 = 3;
  constexpr size_t kMaxDims = 5;
  QVL_REQUIRE(sizes.size() <= kMaxDims && strides.size() + 1 == sizes.size() && box.size() == sizes.size(),
              QVL_INTERNAL, "a tensor map of %zu dimensions", sizes.size());
  uint64_t all_sizes[kMaxDims], all_strides[kMaxDims];
  uint32_t all_boxes[kMaxDims], steps[kMaxDims];
  std::copy(sizes.begin(), sizes.end(), all_sizes);
  std::copy(strides.begin(), strides.end(), all_strides);
  std::copy(box.begin(), box.end(), all_boxes);
  std::fill(steps, steps + kMaxDims, 1);
  TensorMap map;
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "the size of the driver's type");
  check(driver().cuTensorMapEncodeTiled(
            reinterpret_cast<CUtensorMap*>(&map), gpu.half() == Half::kBfloat16 ? kBfloat16 : kFloat16,
            static_cast<unsigned>(sizes.size()), const_cast<void*>(base), all_sizes, all_strides, all_boxes,
            steps, /*interleave=*/0, swizzled ? kSwizzle128 : 0, kL2Lines256, /*oobFill=*/0),
        "encoding a tensor map");
  return map;
}

}  // namespace qvl::cuda
