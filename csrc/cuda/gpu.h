// A GPU with its loaded kernels, and kernel launches.
#pragma once

#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/driver.h"

namespace qvl::cuda {

// Compute type of the kernels, whose code calls it H.
enum class Half { kBfloat16, kFloat16 };

// Scope guard that makes a context current for the calling thread.
class CurrentContext {
 public:
  explicit CurrentContext(CUcontext context) { check(driver().cuCtxPushCurrent(context), "using the GPU"); }
  ~CurrentContext() {
    CUcontext popped;
    driver().cuCtxPopCurrent(&popped);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
};

// Size of a grid, in blocks.
struct Dim {
  unsigned x, y = 1, z = 1;
};

class Gpu {
 public:
  // Open GPU `index` and load the cubins for its architecture and the compute type `half` from the folder
  // QWENVL_CUDA_KERNELS, or if that variable is unset or empty, from the folder of this library. Throws
  // QVL_UNSUPPORTED if there is no such GPU, if it is too old for `half`, or if the folder has no cubins for
  // it.
  Gpu(int index, Half half);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  CUcontext context() const { return context_; }
  int multiprocessors() const { return multiprocessors_; }
  int arch() const { return arch_; }  // compute capability times ten: 90 for 9.0
  Half half() const { return half_; }

  // Launch the kernel `name`, which takes `params` by value as its only parameter; the context must be
  // current. early: programmatic dependent launch on sm_90 and newer: the kernel may start while its
  // predecessors run. Before it reads memory that a kernel still running writes, or writes memory that such a
  // kernel reads, it must execute griddepcontrol.wait (wait_for_predecessors() in kernels/common.cuh).
  template <typename Params>
  void launch(CUstream stream, const char* name, Dim grid, int threads, int shared_bytes,
              const Params& params, bool early = false) const {
    launch_bytes(stream, name, grid, threads, shared_bytes, &params, early);
  }

 private:
  struct Kernel {
    CUfunction function;
    int shared_bytes;  // current limit of dynamic shared memory per block
  };

  void launch_bytes(CUstream stream, const char* name, Dim grid, int threads, int shared_bytes,
                    const void* params, bool early) const;
  Kernel& kernel(const char* name) const;

  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  int multiprocessors_ = 0, arch_ = 0;
  Half half_;
  std::vector<CUmodule> modules_;
  mutable std::mutex lock_;
  mutable std::unordered_map<std::string, Kernel> kernels_;
};

}  // namespace qvl::cuda
