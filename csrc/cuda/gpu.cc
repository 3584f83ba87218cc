#include "cuda/gpu.h"

#include <dirent.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "core/error.h"

namespace qvl::cuda {
namespace {

// Constants of the driver's interface.
constexpr int kMaxDynamicShared = 8;           // attribute of a function
constexpr int kProgrammaticSerialization = 6;  // attribute of a launch
constexpr int kDefaultShared = 48 << 10;       // bytes of dynamic shared memory without kMaxDynamicShared

// Folder of the cubins: QWENVL_CUDA_KERNELS, else the folder of this library.
std::string kernel_folder() {
  const char* folder = std::getenv("QWENVL_CUDA_KERNELS");
  if (folder != nullptr && *folder != 0) return folder;
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&kernel_folder), &info);
  const std::string path = info.dli_fname != nullptr ? info.dli_fname : "";
  const size_t slash = path.rfind('/');
  return slash != std::string::npos ? path.substr(0, slash) : ".";
}

bool ends_with(const std::string& text, const std::string& suffix) {
  return text.size() >= suffix.size() &&
         text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// Sorted paths of the files in `folder` whose names end in `suffix`.
std::vector<std::string> files(const std::string& folder, const std::string& suffix) {
  std::vector<std::string> paths;
  DIR* const listing = opendir(folder.c_str());
  if (listing == nullptr) return paths;
  while (const dirent* entry = readdir(listing)) {
    if (ends_with(entry->d_name, suffix)) paths.push_back(folder + "/" + entry->d_name);
  }
  closedir(listing);
  std::sort(paths.begin(), paths.end());
  return paths;
}

}  // namespace

Gpu::Gpu(int index, Half half) : half_(half) {
  const Driver& d = driver();
  int count = 0, major = 0, minor = 0;
  check(d.cuDeviceGetCount(&count), "counting GPUs");
  QVL_REQUIRE(index >= 0 && index < count, QVL_UNSUPPORTED, "no GPU %d: this process sees %d", index, count);
  check(d.cuDeviceGet(&device_, index), "finding the GPU");
  check(d.cuDeviceGetAttribute(&major, kComputeMajor, device_), "querying the compute capability");
  check(d.cuDeviceGetAttribute(&minor, kComputeMinor, device_), "querying the compute capability");
  check(d.cuDeviceGetAttribute(&multiprocessors_, kMultiprocessors, device_), "querying multiprocessors");
  arch_ = 10 * major + minor;
  QVL_REQUIRE(arch_ >= (half == Half::kBfloat16 ? 80 : 70), QVL_UNSUPPORTED,
              "GPU %d has compute capability %d.%d; the engine needs 7.0 for float16 and 8.0 for bfloat16",
              index, major, minor);
  const std::string folder = kernel_folder();
  const char* type = half == Half::kBfloat16 ? "bf16" : "f16";
  // Cubins for sm_90a run only on sm_90, where they are preferred to those for sm_90; likewise for other
  // architectures with a variant "a".
  std::vector<std::string> cubins;
  for (const char* suffix : {"a.", "."}) {
    cubins = files(folder, ".sm_" + std::to_string(arch_) + suffix + type + ".cubin");
    if (!cubins.empty()) break;
  }
  QVL_REQUIRE(!cubins.empty(), QVL_UNSUPPORTED, "no GPU kernels (*.sm_%d.%s.cubin) in %s", arch_, type,
              folder.c_str());
  check(d.cuDevicePrimaryCtxRetain(&context_, device_), "opening the GPU");
  try {
    const CurrentContext current(context_);
    for (const std::string& path : cubins) {
      std::ifstream file(path, std::ios::binary);
      const std::vector<char> code{std::istreambuf_iterator<char>(file), {}};
      CUmodule module = nullptr;
      check(d.cuModuleLoadData(&module, code.data()), path.c_str());
      modules_.push_back(module);
    }
  } catch (...) {
    d.cuDevicePrimaryCtxRelease(device_);
    throw;
  }
}

Gpu::~Gpu() {
  {
    const CurrentContext current(context_);
    for (CUmodule module : modules_) driver().cuModuleUnload(module);
  }
  driver().cuDevicePrimaryCtxRelease(device_);
}

Gpu::Kernel& Gpu::kernel(const char* name) const {
  const std::lock_guard<std::mutex> lock(lock_);
  const auto found = kernels_.find(name);
  if (found != kernels_.end()) return found->second;
  for (CUmodule module : modules_) {
    CUfunction function = nullptr;
    if (driver().cuModuleGetFunction(&function, module, name) != 0) continue;
    return kernels_.emplace(name, Kernel{function, kDefaultShared}).first->second;
  }
  fail(QVL_INTERNAL, "GPU kernel %s not found", name);
}

void Gpu::launch_bytes(CUstream stream, const char* name, Dim grid, int threads, int shared_bytes,
                       const void* params, bool early) const {
  Kernel& launched = kernel(name);
  if (shared_bytes > launched.shared_bytes) {
    check(driver().cuFuncSetAttribute(launched.function, kMaxDynamicShared, shared_bytes), name);
    launched.shared_bytes = shared_bytes;
  }
  CUlaunchAttribute attribute{};
  attribute.id = kProgrammaticSerialization;
  attribute.value[0] = 1;
  CUlaunchConfig config{};
  config.grid_x = grid.x;
  config.grid_y = grid.y;
  config.grid_z = grid.z;
  config.block_x = static_cast<unsigned>(threads);
  config.block_y = config.block_z = 1;
  config.shared_bytes = static_cast<unsigned>(shared_bytes);
  config.stream = stream;
  config.attributes = &attribute;
  config.n_attributes = early && arch_ >= 90 ? 1 : 0;
  void* arguments[] = {const_cast<void*>(params)};
  check(driver().cuLaunchKernelEx(&config, launched.function, arguments, nullptr), name);
}

}  // namespace qvl::cuda
