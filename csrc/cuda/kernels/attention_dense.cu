// Attention over all keys of an image: the vision tower (head_dim 104, 1024 patches) and the resampler.
//
// A block has 64 queries of a head of an image. Layout and cost: attention.cuh.
#include "cuda/kernels/attention_prompt.h"

#include "cuda/kernels/attention.cuh"

namespace qvl::cuda {

struct DenseKeys {
  const H *k, *v;
  int64 stride;
  int n, head_dim;

  __device__ H value(int part, int key, int d) const { return (part == 0 ? k : v)[key * stride + d]; }

#if __CUDA_ARCH__ >= 800
  template <int D>
  __device__ void load(H* to, int part, int first) const {
    const H* const from = part == 0 ? k : v;
    for (int i = threadIdx.x; i < kAttentionKeys<D> * D / 8; i += kAttentionThreads) {
      const int key = i / (D / 8), d = i % (D / 8) * 8;
      const bool there = first + key < n && d < head_dim;
      copy_async(to + key * (D + 8) + d, there ? from + (first + key) * stride + d : from, there ? 16 : 0);
    }
  }
#endif
};

template <int D>
__device__ inline void dense(const DenseParams& p) {
  wait_for_predecessors();
  const int first = blockIdx.x * kAttentionTile, head = blockIdx.y, image = blockIdx.z;
  const int64 kv = image * p.kv_image + head * p.kv_head;
  const DenseKeys keys{static_cast<const H*>(p.k) + kv, static_cast<const H*>(p.v) + kv, p.kv_stride,
                       p.n_keys, p.head_dim};
  Job job;
  job.q = static_cast<const H*>(p.q) + image * p.q_image + first * p.q_stride + head * p.q_head;
  job.q_stride = p.q_stride;
  job.y_stride = static_cast<int64>(p.heads) * p.head_dim;
  job.y = static_cast<H*>(p.y) + (static_cast<int64>(image) * p.n_queries + first) * job.y_stride +
          head * p.head_dim;
  job.n = min(kAttentionTile, p.n_queries - first);
  job.n_keys = p.n_keys;
  job.head_dim = p.head_dim;
  job.first_position = 0;
  job.causal = false;
  job.scale = p.scale;
  attend<D>(job, keys);
  start_successors();
}

#define QVL_DENSE(D)                                               \
  extern "C" __global__ void __launch_bounds__(kAttentionThreads)  \
      attention_dense_##D(const __grid_constant__ DenseParams p) { \
    dense<D>(p);                                                   \
  }
QVL_DENSE(32)
QVL_DENSE(64)
QVL_DENSE(112)
QVL_DENSE(128)

}  // namespace qvl::cuda
