#include "probe/probe_arm.h"

namespace bezel {
namespace {

struct NeonI8mm : Neon {
  static constexpr int kDotOps = 64;
  static Ints dot(Ints sum, Ints factor) {
    return vmmlaq_s32(sum, vreinterpretq_s8_s32(sum), vreinterpretq_s8_s32(factor));
  }
};

}  // namespace

ProbeLoops probe_loops_neoni8mm() noexcept { return probe_loops<NeonI8mm>(); }

}  // namespace bezel
