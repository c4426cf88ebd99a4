#include "base/topology.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bezel {
namespace linux_sysfs {
namespace {

// Empty where the file is missing or cannot be read.
std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// 0 where the file is missing or holds no number.
double number(const std::string& path) {
  std::istringstream in(first_line(path));
  double value = 0;
  in >> value;
  return value;
}

// The kernel's list notation: "0-3,8".
std::set<int> cpu_list(const std::string& text) {
  std::set<int> cpus;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) {
    std::istringstream range(part);
    int first, last;
    char dash;
    if (!(range >> first)) continue;
    if (!(range >> dash >> last)) last = first;
    for (int cpu = first; cpu <= last; ++cpu) cpus.insert(cpu);
  }
  return cpus;
}

}  // namespace

int fast_cores(const std::string& root, const std::vector<int>& allowed) {
  // Intel's hybrids name their performance cores. Elsewhere a core is fast if its capacity (Arm) or its top
  // frequency is at least 80% of the best: equal cores differ by up to 10%, small ones are 20% or more below.
  const std::set<int> performance = cpu_list(first_line(root + "/sys/devices/cpu_core/cpus"));
  std::map<std::string, double> speed_of_core;
  for (const int cpu : allowed) {
    const std::string dir = root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
    const std::string core = first_line(dir + "/topology/thread_siblings_list");
    if (core.empty()) return 0;
    double speed = performance.count(cpu) ? 1 : 0;
    if (performance.empty()) speed = number(dir + "/cpu_capacity");
    if (performance.empty() && speed == 0) speed = number(dir + "/cpufreq/cpuinfo_max_freq");
    speed_of_core[core] = speed;
  }
  double best = 0;
  for (const auto& entry : speed_of_core) best = std::max(best, entry.second);
  return static_cast<int>(std::count_if(speed_of_core.begin(), speed_of_core.end(),
                                        [best](const auto& entry) { return entry.second >= 0.8 * best; }));
}

int quota_cpus(const std::string& root) {
  std::string group;
  std::ifstream cgroups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(cgroups, line);)
    if (line.compare(0, 3, "0::") == 0) group = line.substr(3);
  int limit = 0;
  for (;;) {  // every ancestor's quota counts; inside a container only the root may be visible
    std::istringstream in(first_line(root + "/sys/fs/cgroup" + group + "/cpu.max"));
    double quota, period;  // quota is "max" where there is none
    if (in >> quota >> period && period > 0) {
      const int cpus = std::max(1, static_cast<int>(std::min(quota / period, 1e6)));
      limit = limit == 0 ? cpus : std::min(limit, cpus);
    }
    if (group.empty()) return limit;
    group.resize(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
}

}  // namespace linux_sysfs

namespace {

#if defined(__linux__)
int usable_cores() {
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return 0;
  std::vector<int> allowed;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &mask)) allowed.push_back(cpu);
  int cores = linux_sysfs::fast_cores("", allowed);
  if (cores == 0) cores = static_cast<int>(allowed.size());
  const int quota = linux_sysfs::quota_cpus("");
  return quota > 0 ? std::min(cores, quota) : cores;
}
#elif defined(__APPLE__)
int usable_cores() {
  for (const char* key : {"hw.perflevel0.physicalcpu", "hw.physicalcpu"}) {  // the first is Apple silicon's
    int cores = 0;
    size_t size = sizeof cores;
    if (sysctlbyname(key, &cores, &size, nullptr, 0) == 0 && cores > 0) return cores;
  }
  return 0;
}
#else
int usable_cores() { return 0; }
#endif

}  // namespace

int default_threads() {
  const int cores = usable_cores();
  return std::max(1, cores > 0 ? cores : static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace bezel
