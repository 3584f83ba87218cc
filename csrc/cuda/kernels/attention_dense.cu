// Attention over all keys of an image: the vision tower (head_dim 104, 1024 patches) and the resampler.
//
// Layout. A block has a tile of queries of one head of one image; grid [tiles][heads][images]:
//
//   vision tower   qkv [image][patch][head][q | k | v][head_dim]        q, k and v point into it
//   resampler      q [query][head][128], the same for all images; k, v [image][patch][head][128]
//
// Tiles, buffers and cost: see attention.cuh, attention_hopper.cuh; 4 * head_dim * heads * n_queries * n_keys
// operations per image, 7 GFLOP per layer of the tower.
//
// Reference: float64 in PyTorch, tests/cuda/test_prompt_attention.py::test_images.
#include "cuda/kernels/attention_hopper.cuh"

namespace qvl::cuda {

// Keys and values of one head of an image, the Source of attend() and attend_hopper(). part: 0: keys; 1:
// values.
struct DenseKeys {
  const H *k, *v;
  int64 stride;
  int n, head_dim;
  const DenseParams& p;
  int image, head;

  __device__ H value(int part, int key, int d) const { return (part == 0 ? k : v)[key * stride + d]; }

#if __CUDA_ARCH__ >= 800
  __device__ void locate(int, int, int) const {}

  template <typename Rows>
  __device__ void load(H* to, int part, int first, int thread) const {
    constexpr int kCopies = Rows::kDims / 8;
    const H* const from = part == 0 ? k : v;
#pragma unroll 4
    for (int i = thread; i < Rows::kKeys * kCopies; i += 128) {
      const int key = i / kCopies, d = i % kCopies * 8;
      const bool valid = first + key < n && d < head_dim;
      copy_async(to + Rows::at(key, d), valid ? from + (first + key) * stride + d : from, valid ? 16 : 0);
    }
  }
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __device__ bool use_tensor_map() const { return p.use_tensor_map != 0; }
  __device__ int column_bytes(int) const { return kHopperKeys * 128; }
  template <int kColumns>
  __device__ void copy(uint32 to, int part, int tile, uint32 barrier) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      copy_box(to + i * kHopperKeys * 128, p.keys[part], 64 * i, tile * kHopperKeys, head, image, barrier);
    }
  }
#endif
};

__device__ inline DenseKeys keys_of(const DenseParams& p, int image, int head) {
  const int64 at = image * p.kv_image + head * p.kv_head;
  return {static_cast<const H*>(p.k) + at,
          static_cast<const H*>(p.v) + at,
          p.kv_stride,
          p.n_keys,
          p.head_dim,
          p,
          image,
          head};
}

__device__ inline Job job_of(const DenseParams& p, int image, int head, int first, int queries) {
  Job job;
  job.q = static_cast<const H*>(p.q) + image * p.q_image + first * p.q_stride + head * p.q_head;
  job.q_stride = p.q_stride;
  job.y_stride = static_cast<int64>(p.heads) * p.head_dim;
  job.y = static_cast<H*>(p.y) + (static_cast<int64>(image) * p.n_queries + first) * job.y_stride +
          head * p.head_dim;
  job.n = min(queries, p.n_queries - first);
  job.n_keys = p.n_keys;
  job.head_dim = p.head_dim;
  job.first_position = 0;
  job.causal = false;
  job.scale = p.scale;
  return job;
}

// D: the largest head_dim of a kernel. The launch (attention_dense.cc) selects the smallest D that is large
// enough: for the vision tower 112, on Hopper 104.
#define QVL_DENSE(D)                                                                                \
  extern "C" __global__ void __launch_bounds__(kAttentionThreads)                                   \
      attention_dense_##D(const __grid_constant__ DenseParams p) {                                  \
    wait_for_predecessors();                                                                        \
    start_successors();                                                                             \
    attend<D>(job_of(p, blockIdx.z, blockIdx.y, blockIdx.x * kAttentionQueries, kAttentionQueries), \
              keys_of(p, blockIdx.z, blockIdx.y));                                                  \
  }
QVL_DENSE(32)
QVL_DENSE(64)
QVL_DENSE(112)
QVL_DENSE(128)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define QVL_DENSE_HOPPER(D)                                                                          \
  extern "C" __global__ void __launch_bounds__(kHopperThreads, 1)                                    \
      attention_dense_hopper_##D(const __grid_constant__ DenseParams p) {                            \
    wait_for_predecessors();                                                                         \
    start_successors();                                                                              \
    attend_hopper<D>(job_of(p, blockIdx.z, blockIdx.y, blockIdx.x * kAttentionTile, kAttentionTile), \
                     keys_of(p, blockIdx.z, blockIdx.y));                                            \
  }
QVL_DENSE_HOPPER(64)
QVL_DENSE_HOPPER(104)
QVL_DENSE_HOPPER(128)
#endif

}  // namespace qvl::cuda
