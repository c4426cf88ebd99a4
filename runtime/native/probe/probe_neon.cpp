#include "probe/probe_arm.h"

namespace bezel {
namespace {

struct NeonMull : Neon {
  static constexpr int kDotOps = 32;
  static Ints dot(Ints sum, Ints factor) {
    const int8x16_t a = vreinterpretq_s8_s32(sum), b = vreinterpretq_s8_s32(factor);
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return vpadalq_s16(sum, vmlal_high_s8(low, a, b));
  }
};

}  // namespace

ProbeLoops probe_loops_neon() noexcept { return probe_loops<NeonMull>(); }

}  // namespace bezel
