// The package has the same rules (paddlemix_qwenvl_plugin/util/control_groups.py).
#include "cpu/control_groups.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <sstream>
#include <vector>

namespace qvl::cpu {
namespace {

// Whether a comma-separated list contains `name`.
bool contains(const std::string& names, const std::string& name) {
  return ("," + names + ",").find("," + name + ",") != std::string::npos;
}

// Folders of the groups with `controller`, each followed by its parents. In a container without a cgroup
// namespace the path of a group is valid only on the host, but the root of the mount is the group of the
// container.
std::vector<std::string> folders_of(const std::string& controller, const std::string& cgroup_file,
                                    const std::string& root) {
  std::ifstream file(cgroup_file);
  std::vector<std::string> folders;
  for (std::string line; std::getline(file, line);) {
    // A line is ID:CONTROLLERS:PATH; with cgroup version 2 there are no controllers.
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !contains(controllers, controller)) continue;
    std::string group = line.substr(second + 1);
    if (group.empty() || group[0] != '/') continue;
    if (group == "/") group.clear();
    // Version 1 has a hierarchy for each list of controllers, mounted in the folder with the list's name.
    const std::string mount = controllers.empty() ? root : root + "/" + controllers;
    for (; !group.empty(); group.erase(group.find_last_of('/'))) folders.push_back(mount + group);
    folders.push_back(mount);
  }
  return folders;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Number of CPUs for a quota per period, both in microseconds; 0 without a limit (quota "max" or -1).
double cpus(const std::string& quota, const std::string& period) {
  const double quota_us = std::strtod(quota.c_str(), nullptr);
  const double period_us = std::strtod(period.c_str(), nullptr);
  return quota_us > 0 && period_us > 0 ? quota_us / period_us : 0;
}

// Number of CPUs of one control group; 0 without a limit.
double quota_of(const std::string& folder) {
  std::istringstream fields(first_line(folder + "/cpu.max"));  // cgroup version 2: "QUOTA PERIOD"
  std::string quota, period;
  fields >> quota >> period;
  if (!quota.empty()) return cpus(quota, period);
  return cpus(first_line(folder + "/cpu.cfs_quota_us"), first_line(folder + "/cpu.cfs_period_us"));
}

// Number at the beginning of the first of the files that begins with one; `fallback` if none does.
uint64_t number_in(std::initializer_list<std::string> paths, uint64_t fallback) {
  for (const std::string& path : paths) {
    std::ifstream file(path);
    uint64_t value = 0;
    if (file >> value) return value;
  }
  return fallback;
}

}  // namespace

double cpu_quota(const std::string& cgroup_file, const std::string& root) {
  double smallest = 0;
  for (const std::string& folder : folders_of("cpu", cgroup_file, root)) {
    const double quota = quota_of(folder);
    if (quota > 0 && (smallest == 0 || quota < smallest)) smallest = quota;
  }
  return smallest;
}

MemoryLimit memory_limit(const std::string& cgroup_file, const std::string& root) {
  MemoryLimit smallest;
  for (const std::string& folder : folders_of("memory", cgroup_file, root)) {
    // The files of cgroup version 2, where "max" is no limit, and of version 1.
    const uint64_t limit = number_in({folder + "/memory.max", folder + "/memory.limit_in_bytes"}, UINT64_MAX);
    const uint64_t used = number_in({folder + "/memory.current", folder + "/memory.usage_in_bytes"}, 0);
    smallest.total = std::min(smallest.total, limit);
    smallest.free = std::min(smallest.free, limit > used ? limit - used : 0);
  }
  return smallest;
}

}  // namespace qvl::cpu
