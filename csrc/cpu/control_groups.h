// Limits of a process's control groups (cgroup version 1 or 2) and of their parents, as containers set them.
// `cgroup_file` lists the groups (/proc/self/cgroup), `root` is their mount point (/sys/fs/cgroup).
#pragma once

#include <cstdint>
#include <string>

namespace qvl::cpu {

// Smallest quota, in CPUs; 0 without a limit.
double cpu_quota(const std::string& cgroup_file, const std::string& root);

struct MemoryLimit {
  uint64_t total = UINT64_MAX;
  uint64_t free = UINT64_MAX;
};

// Smallest limit, and the least memory left within a limit, in bytes; UINT64_MAX without a limit.
MemoryLimit memory_limit(const std::string& cgroup_file, const std::string& root);

}  // namespace qvl::cpu
