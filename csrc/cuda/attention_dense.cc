#include "core/error.h"
#include "cuda/kernels/attention_prompt.h"
#include "cuda/ops.h"

namespace qvl::cuda {

void attention_dense(const Gpu& gpu, CUstream stream, const DenseAttention& a, void* y) {
  QVL_REQUIRE(a.head_dim % 8 == 0 && a.head_dim <= 128, QVL_UNSUPPORTED,
              "attention over images: a head has %d values; a multiple of 8 up to 128 is needed", a.head_dim);
  struct Kernel {
    const char* name;
    int dim;  // of a head, padded
    int shared_bytes;
  };
#define QVL_KERNEL(D)                             \
  {                                               \
    "attention_dense_" #D, D, kAttentionShared<D> \
  }
  constexpr Kernel kKernels[] = {QVL_KERNEL(32), QVL_KERNEL(64), QVL_KERNEL(112), QVL_KERNEL(128)};
#undef QVL_KERNEL
  const Kernel* kernel = kKernels;
  while (kernel->dim < a.head_dim) ++kernel;
  const DenseParams params{a.q,         a.k,      a.v,        y,           a.q_image,
                           a.q_stride,  a.q_head, a.kv_image, a.kv_stride, a.kv_head,
                           a.n_queries, a.n_keys, a.heads,    a.head_dim,  a.scale};
  const Dim grid{static_cast<unsigned>((a.n_queries + kAttentionTile - 1) / kAttentionTile),
                 static_cast<unsigned>(a.heads), static_cast<unsigned>(a.images)};
  gpu.launch(stream, kernel->name, grid, kAttentionThreads, gpu.arch() >= 80 ? kernel->shared_bytes : 0,
             params, true);
}

}  // namespace qvl::cuda
