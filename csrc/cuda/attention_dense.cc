// Launches of kernels/attention_dense.cu.
#include "core/error.h"
#include "cuda/attention.h"
#include "cuda/kernels/attention_prompt.h"
#include "cuda/tensor_map.h"

namespace qvl::cuda {

void attention_dense_with(const Gpu& gpu, CUstream stream, bool portable, const DenseAttention& a, void* y) {
  QVL_REQUIRE(a.head_dim % 8 == 0 && a.head_dim <= 128, QVL_UNSUPPORTED,
              "attention over images: head_dim is %d; it must be a multiple of 8 up to 128", a.head_dim);
  struct Kernel {
    const char* name;
    int dim;  // padded head_dim
    int shared_bytes;
  };
#define QVL_KERNEL(D) {"attention_dense_" #D, D, kAttentionShared<D>}
#define QVL_KERNEL_HOPPER(D)                          \
  {                                                   \
    "attention_dense_hopper_" #D, D, kHopperShared<D> \
  }
  constexpr Kernel kPortable[] = {QVL_KERNEL(32), QVL_KERNEL(64), QVL_KERNEL(112), QVL_KERNEL(128)};
  constexpr Kernel kHopper[] = {QVL_KERNEL_HOPPER(64), QVL_KERNEL_HOPPER(104), QVL_KERNEL_HOPPER(128)};
  const bool hopper = gpu.arch() == 90 && !portable;
  const Kernel* kernel = hopper ? kHopper : kPortable;
  while (kernel->dim < a.head_dim) ++kernel;
  DenseParams params;
  params.q = a.q;
  params.k = a.k;
  params.v = a.v;
  params.y = y;
  params.q_image = a.q_image;
  params.q_stride = a.q_stride;
  params.q_head = a.q_head;
  params.kv_image = a.kv_image;
  params.kv_stride = a.kv_stride;
  params.kv_head = a.kv_head;
  params.n_queries = a.n_queries;
  params.n_keys = a.n_keys;
  params.heads = a.heads;
  params.head_dim = a.head_dim;
  params.scale = a.scale;
  // Addresses and strides of a tensor map are multiples of 16 bytes, 8 values. A stride of 0 gets no map, but
  // no caller has kv_image 0, the same keys for all images.
  params.use_tensor_map = hopper && a.kv_image > 0 && reinterpret_cast<uintptr_t>(a.k) % 16 == 0 &&
                          reinterpret_cast<uintptr_t>(a.v) % 16 == 0 &&
                          (a.kv_stride | a.kv_head | a.kv_image) % 8 == 0;
  if (params.use_tensor_map) {
    for (int part = 0; part < 2; ++part) {  // 0: keys; 1: values
      params.keys[part] =
          tensor_map(gpu, part == 0 ? a.k : a.v, {a.head_dim, a.n_keys, a.heads, a.images},
                     {2 * a.kv_stride, 2 * a.kv_head, 2 * a.kv_image}, {64, kHopperKeys, 1, 1});
    }
  }
  const int block_queries = hopper ? kAttentionTile : kAttentionQueries;
  const Dim grid{static_cast<unsigned>((a.n_queries + block_queries - 1) / block_queries),
                 static_cast<unsigned>(a.heads), static_cast<unsigned>(a.images)};
  // Before sm_80 the kernels are plain loops without shared memory.
  gpu.launch(stream, kernel->name, grid, hopper ? kHopperThreads : kAttentionThreads,
             gpu.arch() >= 80 ? kernel->shared_bytes : 0, params, /*early=*/true);
}

void attention_dense(const Gpu& gpu, CUstream stream, const DenseAttention& a, void* y) {
  attention_dense_with(gpu, stream, /*portable=*/false, a, y);
}

}  // namespace qvl::cuda
