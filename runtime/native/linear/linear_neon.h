// The primitives of Arm's 128 bits. Included with BEZEL_DOT 0 or 1: whether there is an instruction for int8
// dot products, or they are summed up in 16 bits.
#include <arm_neon.h>

#include <cfloat>
#include <cmath>
#include <cstring>

#include "linear/linear_inline.h"
#include "linear/linear_kernels.h"

namespace bezel {
namespace {

constexpr int kLanes = 1;
constexpr int kTileTokens = BEZEL_DOT ? 8 : 4;
constexpr bool kSignedCodes = true;
constexpr bool kNarrowSums = !BEZEL_DOT;
using I = int32x4_t;
using F = float32x4_t;

BEZEL_INLINE I load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
BEZEL_INLINE void store(void* p, I v) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(v)); }
BEZEL_INLINE I and_(I a, I b) { return vandq_s32(a, b); }
BEZEL_INLINE I or_(I a, I b) { return vorrq_s32(a, b); }
BEZEL_INLINE I xor_(I a, I b) { return veorq_s32(a, b); }
BEZEL_INLINE I add32(I a, I b) { return vaddq_s32(a, b); }
BEZEL_INLINE I sub32(I a, I b) { return vsubq_s32(a, b); }
template <int n>
BEZEL_INLINE I shl(I v) {
  return vshlq_n_s32(v, n);
}
template <int n>
BEZEL_INLINE I shr(I v) {
  if constexpr (n == 0) return v;
  else return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v), n));
}
template <int n>
BEZEL_INLINE I sar(I v) {
  return vshrq_n_s32(v, n);
}
BEZEL_INLINE I bytes(int v) { return vreinterpretq_s32_u8(vdupq_n_u8(static_cast<uint8_t>(v))); }
BEZEL_INLINE I words(int v) { return vdupq_n_s32(v); }
BEZEL_INLINE I lo32(I a, I b) { return vzip1q_s32(a, b); }
BEZEL_INLINE I hi32(I a, I b) { return vzip2q_s32(a, b); }
BEZEL_INLINE I lo64(I a, I b) {
  return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
BEZEL_INLINE I hi64(I a, I b) {
  return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
BEZEL_INLINE I load_rows(const uint8_t* p, int64_t) { return load(p); }
BEZEL_INLINE I splat16(const int8_t* p) { return load(p); }

BEZEL_INLINE I splat_word(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return vdupq_n_s32(word);
}

BEZEL_INLINE F to_float(I v) { return vcvtq_f32_s32(v); }
BEZEL_INLINE F half(I v) {
  return vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(v)));
}  // of the low half of each word
BEZEL_INLINE F bits(I v) { return vreinterpretq_f32_s32(v); }
BEZEL_INLINE F halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
BEZEL_INLINE F zero() { return vdupq_n_f32(0.0f); }
BEZEL_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
BEZEL_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
BEZEL_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
BEZEL_INLINE F negative(F v) { return vnegq_f32(v); }
BEZEL_INLINE F splat(const float* p) { return vld1q_dup_f32(p); }
BEZEL_INLINE F load_float(const float* p) { return vld1q_f32(p); }
BEZEL_INLINE void store_float(float* p, F v) { vst1q_f32(p, v); }

BEZEL_INLINE void prefetch(const uint8_t* p) {
#if defined(_MSC_VER) && !defined(__clang__)
  __prefetch(p);
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

BEZEL_INLINE void prefetch_near(const uint8_t* p) {
#if defined(_MSC_VER) && !defined(__clang__)
  __prefetch(p);
#else
  __builtin_prefetch(p, 0, 3);
#endif
}

// 16 where the bit of the column is set, of the two bytes of each lane that begin at byte kAt.
template <int kAt>
BEZEL_INLINE I fifth_bits(I v) {
  const uint8x16_t spread = vcombine_u8(vdup_n_u8(kAt), vdup_n_u8(kAt + 1));
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
  const uint8x16_t set = vtstq_u8(vqtbl1q_u8(vreinterpretq_u8_s32(v), spread), bit);
  return and_(vreinterpretq_s32_u8(set), bytes(16));
}

// The byte of each lane's table at every index 0 … 15.
BEZEL_INLINE I look_up(I table, I index) {
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(index)));
}

// Integer dot products of four codes with four activations, word by word.
#if BEZEL_DOT
template <int kBits, int kSteps>
struct Sum {
  I v;

  BEZEL_INLINE void start() { v = vdupq_n_s32(0); }
  BEZEL_INLINE void start(const int32_t* bias) { v = splat_word(bias); }
  BEZEL_INLINE void add(int, I w, I x) { v = vdotq_s32(v, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x)); }
  template <int k>
  BEZEL_INLINE void step(I w, const int8_t* x) {
    v = vdotq_laneq_s32(v, vreinterpretq_s8_s32(w), vld1q_s8(x + k / 4 * 16), k % 4);
  }
  BEZEL_INLINE I total() const { return v; }
};
#else
// Each of the 16-bit sums has room for twice this many products: they are added in pairs at the end.
template <int kBits, int kSteps>
struct Sum {
  static constexpr int kRoom = kBits == 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
  static constexpr int kGroup = kRoom < kSteps ? kRoom : kSteps;
  static_assert(kGroup * 2 * 127 * (kBits == 8 ? 128 : (1 << kBits) - 1) <= 32767);
  I v;
  int16x8_t low, high;

  BEZEL_INLINE void start() { v = vdupq_n_s32(0); }
  BEZEL_INLINE void start(const int32_t* bias) { v = splat_word(bias); }
  BEZEL_INLINE void add(int k, I w32, I x32) {
    const int8x16_t w = vreinterpretq_s8_s32(w32), x = vreinterpretq_s8_s32(x32);
    if (k % kGroup == 0) {
      low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
      high = vmull_high_s8(w, x);
    } else {
      low = vmlal_s8(low, vget_low_s8(w), vget_low_s8(x));
      high = vmlal_high_s8(high, w, x);
    }
    if (k % kGroup == kGroup - 1) v = vpadalq_s16(v, vpaddq_s16(low, high));
  }
  template <int k>
  BEZEL_INLINE void step(I w, const int8_t* x) {
    add(k, w, splat_word(x + 4 * k));
  }
  BEZEL_INLINE I total() const { return v; }
};
#endif

void quantize(const float* x, int64_t blocks, int tokens, int8_t* q, float* d, int32_t* sums) noexcept {
  for (int64_t b = 0; b < blocks; ++b, x += 32, q += 32 * tokens, d += tokens, sums += 2 * tokens) {
    uint32x4_t top =
        vdupq_n_u32(0);  // as integers, magnitudes keep their order, and infinity and NaN come out on top
    for (int i = 0; i < 8; ++i) top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + 4 * i))));
    const uint32_t max_bits = vmaxvq_u32(top);
    const bool finite = max_bits < 0x7F800000u;
    float scale;
    std::memcpy(&scale, &max_bits, 4);
    scale /= 127.0f;
    const bool usable = finite && scale >= FLT_MIN;
    *d = usable ? scale : finite ? 0.0f : NAN;
    const float inverse = usable ? 1.0f / scale : 0.0f;
    const I keep = words(usable ? -1 : 0);  // an infinity times zero is none
    for (int h = 0; h < 2; ++h) {
      int16x4_t part[4];
      for (int i = 0; i < 4; ++i) {
        const F v = vmulq_n_f32(vld1q_f32(x + 16 * h + 4 * i), inverse);
        part[i] = vmovn_s32(and_(vcvtnq_s32_f32(v), keep));
      }
      const int8x16_t v =
          vcombine_s8(vmovn_s16(vcombine_s16(part[0], part[1])), vmovn_s16(vcombine_s16(part[2], part[3])));
      vst1q_s8(q + 16 * h, v);
      sums[h * tokens] = vaddlvq_s8(v);
    }
  }
}

}  // namespace
}  // namespace bezel

#include "linear/linear_vector.h"
