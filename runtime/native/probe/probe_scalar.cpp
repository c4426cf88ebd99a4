#include <cstring>

#include "probe/probe_loops.h"

namespace bezel {
namespace {

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

}  // namespace

ProbeLoops probe_loops_scalar() noexcept { return probe_loops<Scalar>(); }

}  // namespace bezel
