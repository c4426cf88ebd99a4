#include "probe/probe.h"

#include <chrono>
#include <cstring>

#include "base/cpu.h"
#include "probe/probe_loops.h"

namespace bezel {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Scalar {
  using Ints = uint64_t;
  using Floats = float;
  static constexpr int kSums = 8, kDotOps = 2, kFmaOps = 2;
  static Ints ints(int value) { return static_cast<uint64_t>(value); }
  static Ints load(const uint8_t* p) {
    uint64_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
  }
  static Ints add64(Ints a, Ints b) { return a + b; }
  static uint64_t fold64(Ints a) { return a; }
  static Ints dot(Ints sum, Ints factor) { return sum * factor + sum; }
  static Floats floats(float value) { return value; }
  static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static uint64_t bits(Floats a) { return static_cast<uint64_t>(a); }
};

ProbeLoops selected_loops() {
  switch (selected_isa()) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::avx2: return probe_loops_avx2();
    case Isa::avxvnni: return probe_loops_avxvnni();
    case Isa::avx512vnni: return probe_loops_avx512vnni();
#elif defined(__aarch64__) || defined(_M_ARM64)
    case Isa::neon: return probe_loops_neon();
    case Isa::neondot: return probe_loops_neondot();
    case Isa::neoni8mm: return probe_loops_neoni8mm();
#endif
    default: return probe_loops<Scalar>();
  }
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
