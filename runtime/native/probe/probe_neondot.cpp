#include "probe/probe_arm.h"

namespace bezel {
namespace {

struct NeonDot : Neon {
  static constexpr int kDotOps = 32;
  static Ints dot(Ints sum, Ints factor) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(sum), vreinterpretq_s8_s32(factor));
  }
};

}  // namespace

ProbeLoops probe_loops_neondot() noexcept { return probe_loops<NeonDot>(); }

}  // namespace bezel
