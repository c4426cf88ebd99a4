#include <immintrin.h>

#include "probe/probe_loops.h"

namespace bezel {
namespace {

struct Zmm {
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kSums = 12, kDotOps = 128, kFmaOps = 32;
  static Ints ints(int value) { return _mm512_set1_epi32(value); }
  static Ints load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Ints add64(Ints a, Ints b) { return _mm512_add_epi64(a, b); }
  static uint64_t fold64(Ints a) {
    alignas(64) uint64_t words[8];
    _mm512_store_si512(words, a);
    uint64_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += words[i];
    return sum;
  }
  static Ints dot(Ints sum, Ints factor) { return _mm512_dpbusd_epi32(sum, sum, factor); }
  static Floats floats(float value) { return _mm512_set1_ps(value); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static uint64_t bits(Floats a) { return fold64(_mm512_castps_si512(a)); }
};

}  // namespace

ProbeLoops probe_loops_avx512vnni() noexcept { return probe_loops<Zmm>(); }

}  // namespace bezel
