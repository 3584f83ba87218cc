#include "cuda/memory.h"

#include "core/error.h"

namespace qvl::cuda {
namespace {

// Constants of the driver's interface.
constexpr int kMemoryType = 2;                  // attribute of a pointer
constexpr unsigned kPortable = 1, kMapped = 2;  // flags of page-locked memory
constexpr unsigned kNoTiming = 2;               // flag of an event

}  // namespace

bool is_device_visible(const void* pointer) {
  unsigned type = 0;
  return driver().cuPointerGetAttribute(&type, kMemoryType, address(pointer)) == 0 && type != 0;
}

void copy(CUstream stream, void* to, const void* from, uint64_t bytes) {
  check(driver().cuMemcpyAsync(address(to), address(from), bytes, stream), "copying");
}

void* allocate(uint64_t bytes) {
  CUdeviceptr memory = 0;
  const CUresult result = driver().cuMemAlloc(&memory, bytes);
  if (result == kOutOfMemory) {
    size_t free = 0, total = 0;
    driver().cuMemGetInfo(&free, &total);
    fail(QVL_NO_MEMORY, "out of GPU memory: %.2f GiB are needed, %.2f of %.2f GiB are free", gib(bytes),
         gib(free), gib(total));
  }
  check(result, "allocating GPU memory");
  return reinterpret_cast<void*>(static_cast<uintptr_t>(memory));
}

void* allocate_host(uint64_t bytes) {
  void* memory = nullptr;
  const CUresult result = driver().cuMemHostAlloc(&memory, bytes, kPortable | kMapped);
  QVL_REQUIRE(result != kOutOfMemory, QVL_NO_MEMORY,
              "out of memory: %.2f GiB of page-locked memory are needed", gib(bytes));
  check(result, "allocating page-locked memory");
  return memory;
}

StreamEvent::StreamEvent() {
  check(driver().cuEventCreate(&event_, kNoTiming), "creating an event");
}

bool StreamEvent::done() {
  const CUresult result = driver().cuEventQuery(event_);
  if (result == kNotReady) return false;
  check(result, "computing on the GPU");
  return true;
}

}  // namespace qvl::cuda
