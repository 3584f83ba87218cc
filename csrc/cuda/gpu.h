// A GPU with its loaded kernels, and kernel launches.
#pragma once

#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/driver.h"

namespace qvl::cuda {

enum class Half { kBfloat16, kFloat16 };  // compute type, H in the kernels

// Scope guard that makes a context current for the calling thread.
class Current {
 public:
  explicit Current(CUcontext context) { check(driver().cuCtxPushCurrent(context), "using the GPU"); }
  ~Current() {
    CUcontext popped;
    driver().cuCtxPopCurrent(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

struct Dim {
  unsigned x, y = 1, z = 1;
};

class Gpu {
 public:
  // Load all cubins of `half` for this GPU from the kernel folder.
  Gpu(int index, Half half);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  CUcontext context() const { return context_; }
  int multiprocessors() const { return multiprocessors_; }
  int arch() const { return arch_; }  // 90 for compute capability 9.0
  Half half() const { return half_; }

  // Launch the kernel `name`, which takes `params` by value as its only parameter. With `early` (programmatic
  // dependent launch, sm_90 and newer) it may start while its predecessor runs: the kernel must execute
  // griddepcontrol.wait before it reads memory written by another kernel or writes memory read by another
  // kernel.
  template <typename Params>
  void launch(CUstream stream, const char* name, Dim grid, int threads, int shared_bytes,
              const Params& params, bool early = false) const {
    launch_bytes(stream, name, grid, threads, shared_bytes, &params, early);
  }

 private:
  struct Kernel {
    CUfunction function;
    int shared_bytes;  // current limit of dynamic shared memory
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
