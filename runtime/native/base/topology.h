// How many threads to use when nobody says.
#pragma once

#include <string>
#include <vector>

namespace bezel {

// Physical performance cores that this process may use, at least 1: a second thread on a core, or a slow core
// beside fast ones, adds little to memory-bound work and takes from whatever else the laptop does.
// Respects the affinity mask and the cgroup's CPU quota on Linux.
int default_threads();

namespace linux_sysfs {  // under `root`, so that a made-up machine can be tested

// Fast physical cores among the logical processors `allowed`; 0 where the kernel does not tell.
int fast_cores(const std::string& root, const std::vector<int>& allowed);

// Whole processors that the cgroup v2 quota pays for, at least 1; 0 where there is no quota.
int quota_cpus(const std::string& root);

}  // namespace linux_sysfs
}  // namespace bezel
