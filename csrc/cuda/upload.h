// Copies of mapped or pageable host memory to the GPU, by several threads through page-locked buffers, at the
// bandwidth of the bus or the disk.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "cuda/memory.h"

namespace qvl::cuda {

class Uploader {
 public:
  Uploader(CUcontext context, CUstream stream);
  ~Uploader();

  // Copy in the order of the constructor's stream. `from` may change once this function returns, although the
  // copy to the GPU may end later.
  void copy(void* to, const void* from, uint64_t bytes);

 private:
  struct Slot {
    HostMemory memory;
    StreamEvent copied;  // end of the slot's last copy
  };
  struct Worker {
    CUstream stream = nullptr;
    StreamEvent finished;       // end of the worker's last copy
    std::array<Slot, 2> slots;  // double buffer: one is filled while the other is copied
    size_t next = 0;
  };

  // Copy through the slots of a worker, on its stream.
  void copy_part(Worker& worker, char* to, const char* from, uint64_t bytes);

  CUcontext context_;
  CUstream stream_;
  StreamEvent earlier_work_;  // on stream_
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace qvl::cuda
