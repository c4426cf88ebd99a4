#include "probe/probe_x86.h"

namespace bezel {
namespace {

struct Avx2 : Ymm {
  static Ints dot(Ints sum, Ints factor) {
    const Ints pairs = _mm256_maddubs_epi16(sum, factor);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

ProbeLoops probe_loops_avx2() noexcept { return probe_loops<Avx2>(); }

}  // namespace bezel
