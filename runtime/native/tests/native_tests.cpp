// For the sanitizers, and for what Python cannot reach. Built by -DBEZEL_NATIVE_TESTS=ON, with or without
// -DCMAKE_CXX_FLAGS=-fsanitize=thread (or address,undefined).
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "base/thread_pool.h"
#include "base/topology.h"
#include "text/strings.h"

#define CHECK(condition)                                              \
  do {                                                                \
    if (!(condition)) {                                               \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                   \
    }                                                                 \
  } while (false)

namespace fs = std::filesystem;
using bezel::ThreadPool;

static void each_item_is_visited_once(ThreadPool& pool, int64_t n, int64_t grain) {
  std::vector<int> visits(static_cast<size_t>(n));  // not atomic: two visits at once are a race to be reported
  pool.parallel_for(n, grain, [&](int64_t begin, int64_t end) noexcept {
    CHECK(0 <= begin && begin < end && end <= n && end - begin <= grain);
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
  });
  for (const int count : visits) CHECK(count == 1);
}

static void pool_covers_every_size() {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (const int64_t n : {0, 1, 2, 7, 64, 1000})
      for (const int64_t grain : {1, 3, 64, 5000}) each_item_is_visited_once(pool, n, grain);
  }
}

static void every_thread_takes_part() {
  constexpr int kThreads = 3;
  ThreadPool pool(kThreads);
  std::atomic<int> arrived{0};  // nobody can leave before all have come, so no thread can take two items
  pool.parallel_for(kThreads, 1, [&](int64_t, int64_t) noexcept {
    ++arrived;
    while (arrived.load() < kThreads) std::this_thread::yield();
  });
  CHECK(arrived.load() == kThreads);
}

static void sleepers_wake_and_callers_take_turns() {
  ThreadPool shared(3), other(2);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // long past the spin
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([&, c] {
      for (int i = 0; i < 200; ++i) {
        each_item_is_visited_once(i % 4 == 3 ? other : shared, 50 + c, 2);
        if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  for (std::thread& caller : callers) caller.join();
}

static void pools_come_and_go() {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(4);
    if (i % 2) each_item_is_visited_once(pool, 10, 1);
  }
}

// A directory that looks like the parts of a Linux machine that are read.
struct Machine {
  const long long now = std::chrono::steady_clock::now().time_since_epoch().count();
  const fs::path root = fs::temp_directory_path() / ("bezel-native-tests-" + std::to_string(now));
  ~Machine() { fs::remove_all(root); }
  void file(const std::string& path, const std::string& text) const {
    fs::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text << '\n';
  }
  void cpu(int id, const std::string& siblings, const std::string& key = "", const std::string& speed = "") {
    const std::string dir = "sys/devices/system/cpu/cpu" + std::to_string(id) + "/";
    file(dir + "topology/thread_siblings_list", siblings);
    if (!key.empty()) file(dir + key, speed);
  }
  int cores(const std::vector<int>& allowed) const {
    return bezel::linux_sysfs::fast_cores(root.string(), allowed);
  }
  int quota() const { return bezel::linux_sysfs::quota_cpus(root.string()); }
};

static void fast_cores_are_counted() {
  {
    Machine two_threads_a_core;
    for (int i = 0; i < 8; ++i)
      two_threads_a_core.cpu(i, std::to_string(i % 4) + "," + std::to_string(i % 4 + 4));
    CHECK(two_threads_a_core.cores({0, 1, 2, 3, 4, 5, 6, 7}) == 4);
    CHECK(two_threads_a_core.cores({0, 4}) == 1);
    CHECK(two_threads_a_core.cores({0, 9}) == 0);
  }
  {
    Machine hybrid;  // two fast cores of two threads, four slow ones close in frequency: the list decides
    hybrid.file("sys/devices/cpu_core/cpus", "0-3");
    for (int i = 0; i < 4; ++i) hybrid.cpu(i, i < 2 ? "0-1" : "2-3", "cpufreq/cpuinfo_max_freq", "5500000");
    for (int i = 4; i < 8; ++i) hybrid.cpu(i, std::to_string(i), "cpufreq/cpuinfo_max_freq", "4700000");
    CHECK(hybrid.cores({0, 1, 2, 3, 4, 5, 6, 7}) == 2);
    CHECK(hybrid.cores({4, 5, 6}) == 3);
  }
  {
    Machine arm;
    const char* const capacity[] = {"310", "310", "310", "310", "310", "310", "930", "1024"};
    for (int i = 0; i < 8; ++i) arm.cpu(i, std::to_string(i), "cpu_capacity", capacity[i]);
    CHECK(arm.cores({0, 1, 2, 3, 4, 5, 6, 7}) == 2);
  }
  {
    Machine compact;
    const char* const frequency[] = {"5100000", "4900000", "3300000", "3300000"};
    for (int i = 0; i < 4; ++i) compact.cpu(i, std::to_string(i), "cpufreq/cpuinfo_max_freq", frequency[i]);
    CHECK(compact.cores({0, 1, 2, 3}) == 2);
  }
}

static void quota_is_found() {
  Machine machine;
  CHECK(machine.quota() == 0);
  machine.file("proc/self/cgroup", "1:cpu:/legacy\n0::/user/app");
  machine.file("sys/fs/cgroup/user/app/cpu.max", "max 100000");
  CHECK(machine.quota() == 0);
  machine.file("sys/fs/cgroup/user/cpu.max", "350000 100000");
  CHECK(machine.quota() == 3);
  machine.file("sys/fs/cgroup/user/app/cpu.max", "50000 100000");
  CHECK(machine.quota() == 1);
  machine.file("sys/fs/cgroup/user/app/cpu.max", "800000 100000");
  CHECK(machine.quota() == 3);
}

// In memory of just the size, so that a byte read past it is seen.
static void strings_end_where_their_data_ends() {
  const std::vector<uint8_t> whole = {2, 0, 0, 0, 0, 0, 0, 0, 'a', 'b', 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 'c'};
  const size_t lasts[] = {10, 18, 27};
  for (size_t size = 0; size <= whole.size(); ++size) {
    const std::vector<uint8_t> data(whole.begin(), whole.begin() + static_cast<int64_t>(size));
    const std::vector<int64_t> ends = bezel::string_ends(data.data(), static_cast<int64_t>(size), 9);
    size_t fit = 0;
    while (fit < 3 && lasts[fit] <= size) ++fit;
    CHECK(ends.size() == fit);
    std::vector<uint8_t> text(ends.empty() ? 0 : static_cast<size_t>(ends.back()));
    bezel::copy_strings(data.data(), ends, text.data());
    if (fit == 3) CHECK(text == std::vector<uint8_t>({'a', 'b', 'c'}));
  }
  const std::vector<uint8_t> huge(8, 255);
  CHECK(bezel::string_ends(huge.data(), 8, 1).empty());
}

int main() {
  pool_covers_every_size();
  every_thread_takes_part();
  sleepers_wake_and_callers_take_turns();
  pools_come_and_go();
  fast_cores_are_counted();
  quota_is_found();
  strings_end_where_their_data_ends();
  CHECK(bezel::default_threads() >= 1);
  std::puts("ok");
}
