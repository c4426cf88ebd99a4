#include "probe/probe_x86.h"

namespace bezel {
namespace {

struct AvxVnni : Ymm {
  static Ints dot(Ints sum, Ints factor) { return _mm256_dpbusd_avx_epi32(sum, sum, factor); }
};

}  // namespace

ProbeLoops probe_loops_avxvnni() noexcept { return probe_loops<AvxVnni>(); }

}  // namespace bezel
