// qvl_get_device_info for the CPU.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>

#include "core/backend.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace qvl {
namespace {

// Value of the first line "NAME: value" or "NAME\t: value" of a file; empty if there is none.
std::string entry(const char* path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (line.compare(0, name.size(), name) != 0 || colon == std::string::npos) continue;
    const size_t value = line.find_first_not_of(" \t", colon + 1);
    return value != std::string::npos ? line.substr(value) : "";
  }
  return "";
}

// Number at the beginning of a file; `fallback` if the file does not exist or begins with "max".
uint64_t number_in(const std::string& path, uint64_t fallback) {
  std::ifstream file(path);
  uint64_t value = 0;
  return file >> value ? value : fallback;
}

// Reduce total and free memory to what the limits of this process's control group and its parents (cgroup 1
// or 2) allow.
void limit_memory(qvl_device_info* info) {
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    // A line is ID:CONTROLLERS:PATH; with cgroup 2 the ID is 0 and there are no controllers.
    const bool version_2 = line.compare(0, 3, "0::") == 0;
    if (!version_2 && line.find(":memory:") == std::string::npos) continue;
    const std::string root = version_2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    std::string group = line.substr(line.rfind(':') + 1);
    while (true) {
      const std::string folder = root + group;
      const uint64_t limit =
          number_in(folder + (version_2 ? "/memory.max" : "/memory.limit_in_bytes"), UINT64_MAX);
      const uint64_t used = number_in(folder + (version_2 ? "/memory.current" : "/memory.usage_in_bytes"), 0);
      info->memory_bytes = std::min(info->memory_bytes, limit);
      info->free_bytes = std::min(info->free_bytes, limit > used ? limit - used : 0);
      // Continue with the parent group.
      const size_t slash = group.rfind('/');
      if (group.empty() || slash == std::string::npos) break;
      group.erase(slash);
    }
  }
}

}  // namespace

void describe_cpu(qvl_device_info* info) {
  const std::string model = entry("/proc/cpuinfo", "model name");
  snprintf(info->name, sizeof info->name, "%s", model.empty() ? "CPU" : model.c_str());
  info->memory_bytes =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const std::string available = entry("/proc/meminfo", "MemAvailable");
  info->free_bytes = available.empty() ? info->memory_bytes : std::stoull(available) * 1024;  // from KiB
  limit_memory(info);
  info->threads = cpu::thread_count(0);
  snprintf(info->isa, sizeof info->isa, "%s", cpu::isa_name(cpu::kernels_for(QVL_ISA_BEST).isa));
}

}  // namespace qvl
