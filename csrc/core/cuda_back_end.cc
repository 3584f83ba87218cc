// Loading of the CUDA back end's library.
#include <dlfcn.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "core/backend.h"
#include "core/error.h"

namespace qvl {
namespace {

constexpr char kLibrary[] = "libqwenvl_cuda.so";

[[noreturn]] void fail_to_load(const char* reason) {
  fail(QVL_UNSUPPORTED, "no GPU back end: %s; run qwenvl build-engine --device gpu", reason);
}

const CudaEntryPoints* load() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&load), &info);
  const std::string here = info.dli_fname != nullptr ? info.dli_fname : "";
  const std::string path = here.substr(0, here.rfind('/') + 1) + kLibrary;
  void* library = dlopen(path.c_str(), RTLD_NOW);
  if (library == nullptr) {
    const std::string error = dlerror();
    // Given only a name, dlopen() finds a library that the process has already loaded (the plugin does that,
    // because its two libraries may be in different folders), or searches the loader's path.
    library = dlopen(kLibrary, RTLD_NOW);
    if (library == nullptr) fail_to_load(access(path.c_str(), F_OK) == 0 ? error.c_str() : dlerror());
  }
  const auto* found = static_cast<const CudaEntryPoints*>(dlsym(library, "qvl_cuda_back_end"));
  if (found == nullptr) fail_to_load(dlerror());
  QVL_REQUIRE(std::strcmp(found->version, qvl_version()) == 0, QVL_UNSUPPORTED,
              "%s and the engine have different versions; run qwenvl build-engine --device gpu", kLibrary);
  return found;
}

}  // namespace

const CudaEntryPoints& cuda_back_end() {
  static const CudaEntryPoints* const found = load();
  return *found;
}

}  // namespace qvl
