// CPU quotas of control groups, which limit containers.
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "cpu/thread_pool.h"

namespace qvl::cpu {
namespace {

// Number of CPUs for a quota per period, both in microseconds; 0 without a limit (quota "max" or -1).
double ratio(const std::string& quota, const std::string& period) {
  const double a = std::strtod(quota.c_str(), nullptr), b = std::strtod(period.c_str(), nullptr);
  return a > 0 && b > 0 ? a / b : 0;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

double quota_of(const std::string& folder) {
  std::istringstream both(first_line(folder + "/cpu.max"));  // version 2
  std::string quota, period;
  both >> quota >> period;
  if (!quota.empty()) return ratio(quota, period);
  return ratio(first_line(folder + "/cpu.cfs_quota_us"), first_line(folder + "/cpu.cfs_period_us"));
}

// Smallest quota of a group and its parents. In a container without a cgroup namespace the group's path is
// the host's and does not exist, but the root of the mount is the container's group.
double least_quota(const std::string& mount, std::string group) {
  double least = 0;
  while (true) {
    const double quota = quota_of(mount + group);
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
    if (group.empty()) return least;
    group.erase(group.find_last_of('/'));
  }
}

// Whether a comma-separated list contains `name`.
bool lists(const std::string& names, const std::string& name) {
  return ("," + names + ",").find("," + name + ",") != std::string::npos;
}

}  // namespace

double cpu_quota(const std::string& cgroup_file, const std::string& root) {
  std::ifstream file(cgroup_file);
  double least = 0;
  for (std::string line; std::getline(file, line);) {  // ID:CONTROLLERS:PATH, no controllers: version 2
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !lists(controllers, "cpu")) continue;
    std::string group = line.substr(second + 1);
    if (group.empty() || group[0] != '/') continue;
    if (group == "/") group.clear();
    const double quota = least_quota(controllers.empty() ? root : root + "/" + controllers, group);
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
  }
  return least;
}

}  // namespace qvl::cpu
