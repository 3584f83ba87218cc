#include "cuda/driver.h"

#include <dlfcn.h>

#include "core/error.h"

namespace qvl::cuda {
namespace {

constexpr int kOldestVersion = 12000;  // CUDA 12.0

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  QVL_REQUIRE(library != nullptr, QVL_UNSUPPORTED,
              "no NVIDIA driver: libcuda.so.1 cannot be loaded; install the driver, or use the CPU");
  Driver loaded{};
  // The version first: an older driver lacks some of the functions.
  const auto get_version = reinterpret_cast<CUresult (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  QVL_REQUIRE(get_version != nullptr, QVL_UNSUPPORTED, "the NVIDIA driver has no cuDriverGetVersion");
  int version = 0;
  const CUresult queried = get_version(&version);
  QVL_REQUIRE(queried == 0, QVL_UNSUPPORTED, "the NVIDIA driver does not report its CUDA version: error %d",
              queried);
  QVL_REQUIRE(version >= kOldestVersion, QVL_UNSUPPORTED,
              "the NVIDIA driver supports only CUDA %d.%d; install one for CUDA 12 or newer (525 or newer)",
              version / 1000, version % 1000 / 10);
#define QVL_DRIVER_LOAD(field, symbol, arguments)                                 \
  loaded.field = reinterpret_cast<CUresult(*) arguments>(dlsym(library, symbol)); \
  QVL_REQUIRE(loaded.field != nullptr, QVL_UNSUPPORTED, "the NVIDIA driver has no %s", symbol);
  QVL_DRIVER_FUNCTIONS(QVL_DRIVER_LOAD)
#undef QVL_DRIVER_LOAD
  const CUresult result = loaded.cuInit(0);
  QVL_REQUIRE(result != kNoDevice, QVL_UNSUPPORTED, "no NVIDIA GPU found");
  QVL_REQUIRE(result == 0, QVL_UNSUPPORTED, "the NVIDIA driver cannot be initialised: error %d", result);
  return loaded;
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

void check(CUresult result, const char* what) {
  if (result == 0) return;
  const char* text = nullptr;
  driver().cuGetErrorString(result, &text);
  if (result == kOutOfMemory) fail(QVL_NO_MEMORY, "%s: out of GPU memory", what);
  fail(QVL_INTERNAL, "%s: %s (CUDA error %d)", what, text != nullptr ? text : "unknown error", result);
}

}  // namespace qvl::cuda
