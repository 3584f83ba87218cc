// Stub of the GPU back end that computes on the CPU, to test the Python side on machines without GPUs
// (test_gpu_flow.py). It shows two GPUs, with FAKE_FREE_BYTES of free memory if this variable is set, and
// prints for each engine the GPU and the folder of the kernels.
#include <cstdio>
#include <cstdlib>

#include "core/backend.h"

namespace {

int32_t count() {
  return 2;
}

void describe(int32_t index, qvl_device_info* info) {
  qvl::describe_cpu(info);
  std::snprintf(info->name, sizeof info->name, "GPU %d", index);
  info->compute_major = 8;  // from 8 on, GPUs have bfloat16
  if (const char* free = std::getenv("FAKE_FREE_BYTES")) info->free_bytes = std::strtoull(free, nullptr, 10);
}

std::unique_ptr<qvl::Backend> make(const qvl_config& config, const qvl::WeightTable& weights) {
  std::printf("made on GPU %d from %s\n", config.device_index, std::getenv("QWENVL_CUDA_KERNELS"));
  std::fflush(stdout);
  qvl_config on_cpu = config;
  on_cpu.device = QVL_DEVICE_CPU;
  on_cpu.device_index = 0;
  return qvl::make_cpu_backend(on_cpu, weights);
}

}  // namespace

// "0.2": the version of qwenvl.h; libqwenvl.so loads no other.
extern "C" QVL_API const qvl::CudaEntryPoints qvl_cuda_back_end;
const qvl::CudaEntryPoints qvl_cuda_back_end = {"0.2", count, describe, make};
