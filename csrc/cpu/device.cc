// qvl_get_device_info for the CPU.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>

#include "core/backend.h"
#include "cpu/control_groups.h"
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

}  // namespace

void describe_cpu(qvl_device_info* info) {
  const std::string model = entry("/proc/cpuinfo", "model name");
  snprintf(info->name, sizeof info->name, "%s", model.empty() ? "CPU" : model.c_str());
  info->memory_bytes =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const std::string available = entry("/proc/meminfo", "MemAvailable");
  info->free_bytes = available.empty() ? info->memory_bytes : std::stoull(available) * 1024;  // from KiB
  const cpu::MemoryLimit limit = cpu::memory_limit("/proc/self/cgroup", "/sys/fs/cgroup");
  info->memory_bytes = std::min(info->memory_bytes, limit.total);
  info->free_bytes = std::min(info->free_bytes, limit.free);
  info->threads = cpu::thread_count(0);
  snprintf(info->isa, sizeof info->isa, "%s", cpu::isa_name(cpu::kernels_for(QVL_ISA_BEST).isa));
}

}  // namespace qvl
