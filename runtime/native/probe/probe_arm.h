// 128-bit registers for the probes; each instruction set adds its `dot` and kDotOps.
#pragma once

#include <arm_neon.h>

#include "probe/probe_loops.h"

namespace bezel {
namespace {

struct Neon {
  using Ints = int32x4_t;
  using Floats = float32x4_t;
  static constexpr int kSums = 16, kFmaOps = 8;
  static Ints ints(int value) { return vdupq_n_s32(value); }
  static Ints load(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static Ints add64(Ints a, Ints b) {
    return vreinterpretq_s32_u64(vaddq_u64(vreinterpretq_u64_s32(a), vreinterpretq_u64_s32(b)));
  }
  static uint64_t fold64(Ints a) { return vaddvq_u64(vreinterpretq_u64_s32(a)); }
  static Floats floats(float value) { return vdupq_n_f32(value); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static uint64_t bits(Floats a) { return fold64(vreinterpretq_s32_f32(a)); }
};

}  // namespace
}  // namespace bezel
