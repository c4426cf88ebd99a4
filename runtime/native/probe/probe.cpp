#include "probe/probe.h"

#include <chrono>

#include "base/cpu.h"
#include "probe/probe_loops.h"

namespace bezel {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

ProbeLoops selected_loops() {
#define BEZEL_LOOPS(isa) probe_loops_##isa,
  static constexpr decltype(&probe_loops_scalar) of[] = {BEZEL_ISAS(BEZEL_LOOPS)};
#undef BEZEL_LOOPS
  return of[static_cast<int>(selected_isa())]();
}

// Operations a second of a loop that does `ops` in a round.
double peak(ThreadPool& pool, uint64_t (*loop)(int64_t) noexcept, double ops, double seconds) {
  constexpr int64_t kRounds = 10000;  // tens of microseconds: taking a chunk costs nothing beside it
  const int64_t chunks = 64 * pool.threads();
  const auto start = Clock::now();
  double done = 0, elapsed;
  do {
    pool.parallel_for(chunks, 1, [&](int64_t begin, int64_t end) noexcept { loop((end - begin) * kRounds); });
    done += ops * static_cast<double>(chunks * kRounds);
    elapsed = seconds_since(start);
  } while (elapsed < seconds);
  return done / elapsed;
}

}  // namespace

double read_bandwidth(ThreadPool& pool, const uint8_t* data, int64_t bytes) {
  const ProbeLoops loops = selected_loops();
  const int64_t chunks = bytes / kProbeChunk;
  const auto start = Clock::now();
  pool.parallel_for(chunks, 1, [&](int64_t begin, int64_t end) noexcept {
    for (; begin < end; ++begin) loops.read(data + begin * kProbeChunk);
  });
  return static_cast<double>(chunks * kProbeChunk) / seconds_since(start);
}

double int8_peak(ThreadPool& pool, double seconds) {
  const ProbeLoops loops = selected_loops();
  return peak(pool, loops.int8, loops.int8_ops, seconds);
}

double float_peak(ThreadPool& pool, double seconds) {
  const ProbeLoops loops = selected_loops();
  return peak(pool, loops.floats, loops.float_ops, seconds);
}

}  // namespace bezel
