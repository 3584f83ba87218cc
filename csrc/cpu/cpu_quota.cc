// CPU quotas of control groups, which limit containers.
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "cpu/thread_pool.h"

namespace qvl::cpu {
namespace {

// Number of CPUs for a quota per period, both in microseconds; 0 without a limit (quota "max" or -1).
double cpus(const std::string& quota, const std::string& period) {
  const double quota_us = std::strtod(quota.c_str(), nullptr);
  const double period_us = std::strtod(period.c_str(), nullptr);
  return quota_us > 0 && period_us > 0 ? quota_us / period_us : 0;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Number of CPUs of one control group; 0 without a limit.
double quota_of(const std::string& folder) {
  std::istringstream fields(first_line(folder + "/cpu.max"));  // cgroup version 2: "QUOTA PERIOD"
  std::string quota, period;
  fields >> quota >> period;
  if (!quota.empty()) return cpus(quota, period);
  return cpus(first_line(folder + "/cpu.cfs_quota_us"), first_line(folder + "/cpu.cfs_period_us"));
}

// Smallest quota, in CPUs, of a group and its parents; 0 without a limit. In a container without a cgroup
// namespace the path of the group is valid only on the host, but the root of the mount is the group of the
// container.
double smallest_quota(const std::string& mount, std::string group) {
  double smallest = 0;
  while (true) {
    const double quota = quota_of(mount + group);
    if (quota > 0 && (smallest == 0 || quota < smallest)) smallest = quota;
    if (group.empty()) return smallest;
    group.erase(group.find_last_of('/'));
  }
}

// Whether a comma-separated list contains `name`.
bool contains(const std::string& names, const std::string& name) {
  return ("," + names + ",").find("," + name + ",") != std::string::npos;
}

}  // namespace

double cpu_quota(const std::string& cgroup_file, const std::string& root) {
  std::ifstream file(cgroup_file);
  double smallest = 0;
  for (std::string line; std::getline(file, line);) {
    // A line is ID:CONTROLLERS:PATH; with cgroup version 2 there are no controllers.
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !contains(controllers, "cpu")) continue;
    std::string group = line.substr(second + 1);
    if (group.empty() || group[0] != '/') continue;
    if (group == "/") group.clear();
    // Version 1 has a hierarchy for each list of controllers, mounted in the folder with the list's name.
    const double quota = smallest_quota(controllers.empty() ? root : root + "/" + controllers, group);
    if (quota > 0 && (smallest == 0 || quota < smallest)) smallest = quota;
  }
  return smallest;
}

}  // namespace qvl::cpu
