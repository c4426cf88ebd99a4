// Sixteen floats, whatever the registers: one zmm, two ymm, four q registers, or a loop. A kernel written with it
// once gives the same bits on every instruction set, because each lane sees the same correctly rounded
// operations and `sum` adds the lanes in one order. Fused multiply-adds are asked for by name: compile with
// -ffp-contract=off.
//
// The including file defines one of BEZEL_AVX512, BEZEL_AVX2, BEZEL_NEON; none is the portable loop. Everything has
// internal linkage (linear_kernels.h says why).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(BEZEL_AVX512) || defined(BEZEL_AVX2)
#include <immintrin.h>
#elif defined(BEZEL_NEON)
#include <arm_neon.h>
#else
#include <cmath>
#endif

#if defined(_MSC_VER)
#define BEZEL_OP static __forceinline
#define BEZEL_UNROLL
#else
#define BEZEL_OP static inline __attribute__((always_inline))
#define BEZEL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace bezel {
namespace {

constexpr int kLanes = 16;

// A register of each kind and its operations; below, F, I and M are as many as make sixteen lanes.
namespace part {

#if defined(BEZEL_AVX512)

using F = __m512;
using I = __m512i;
using M = __mmask16;
constexpr int kWidth = 16;

BEZEL_OP F load(const float* p) { return _mm512_loadu_ps(p); }
BEZEL_OP void store(float* p, F a) { _mm512_storeu_ps(p, a); }
BEZEL_OP void store(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
BEZEL_OP F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
BEZEL_OP void store_half(uint16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
BEZEL_OP F set(float x) { return _mm512_set1_ps(x); }
BEZEL_OP I set(int32_t x) { return _mm512_set1_epi32(x); }
BEZEL_OP F add(F a, F b) { return _mm512_add_ps(a, b); }
BEZEL_OP F sub(F a, F b) { return _mm512_sub_ps(a, b); }
BEZEL_OP F mul(F a, F b) { return _mm512_mul_ps(a, b); }
BEZEL_OP F div(F a, F b) { return _mm512_div_ps(a, b); }
BEZEL_OP F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
BEZEL_OP F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
BEZEL_OP F max(F a, F b) { return _mm512_max_ps(a, b); }
BEZEL_OP M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
BEZEL_OP F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
BEZEL_OP I add(I a, I b) { return _mm512_add_epi32(a, b); }
BEZEL_OP I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
BEZEL_OP I max(I a, I b) { return _mm512_max_epi32(a, b); }
BEZEL_OP I min(I a, I b) { return _mm512_min_epi32(a, b); }
BEZEL_OP I band(I a, I b) { return _mm512_and_si512(a, b); }
BEZEL_OP I bor(I a, I b) { return _mm512_or_si512(a, b); }
template <int kBits>
BEZEL_OP I shift_left(I a) { return _mm512_slli_epi32(a, kBits); }
BEZEL_OP I bits(F a) { return _mm512_castps_si512(a); }
BEZEL_OP F from_bits(I a) { return _mm512_castsi512_ps(a); }
BEZEL_OP I round(F a) { return _mm512_cvtps_epi32(a); }
BEZEL_OP F to_float(I a) { return _mm512_cvtepi32_ps(a); }
template <int kDistance>
BEZEL_OP F swap(F a) {
  if constexpr (kDistance >= 4) return _mm512_shuffle_f32x4(a, a, kDistance == 8 ? 0x4E : 0xB1);
  else return _mm512_permute_ps(a, kDistance == 2 ? 0x4E : 0xB1);
}

#elif defined(BEZEL_AVX2)

using F = __m256;
using I = __m256i;
using M = __m256;
constexpr int kWidth = 8;

BEZEL_OP F load(const float* p) { return _mm256_loadu_ps(p); }
BEZEL_OP void store(float* p, F a) { _mm256_storeu_ps(p, a); }
BEZEL_OP void store(int32_t* p, I a) { _mm256_storeu_si256((__m256i*)p, a); }
BEZEL_OP F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
BEZEL_OP void store_half(uint16_t* p, F a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
BEZEL_OP F set(float x) { return _mm256_set1_ps(x); }
BEZEL_OP I set(int32_t x) { return _mm256_set1_epi32(x); }
BEZEL_OP F add(F a, F b) { return _mm256_add_ps(a, b); }
BEZEL_OP F sub(F a, F b) { return _mm256_sub_ps(a, b); }
BEZEL_OP F mul(F a, F b) { return _mm256_mul_ps(a, b); }
BEZEL_OP F div(F a, F b) { return _mm256_div_ps(a, b); }
BEZEL_OP F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
BEZEL_OP F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
BEZEL_OP F max(F a, F b) { return _mm256_max_ps(a, b); }
BEZEL_OP M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
BEZEL_OP F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
BEZEL_OP I add(I a, I b) { return _mm256_add_epi32(a, b); }
BEZEL_OP I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
BEZEL_OP I max(I a, I b) { return _mm256_max_epi32(a, b); }
BEZEL_OP I min(I a, I b) { return _mm256_min_epi32(a, b); }
BEZEL_OP I band(I a, I b) { return _mm256_and_si256(a, b); }
BEZEL_OP I bor(I a, I b) { return _mm256_or_si256(a, b); }
template <int kBits>
BEZEL_OP I shift_left(I a) { return _mm256_slli_epi32(a, kBits); }
BEZEL_OP I bits(F a) { return _mm256_castps_si256(a); }
BEZEL_OP F from_bits(I a) { return _mm256_castsi256_ps(a); }
BEZEL_OP I round(F a) { return _mm256_cvtps_epi32(a); }
BEZEL_OP F to_float(I a) { return _mm256_cvtepi32_ps(a); }
template <int kDistance>
BEZEL_OP F swap(F a) {
  if constexpr (kDistance == 4) return _mm256_permute2f128_ps(a, a, 1);
  else return _mm256_permute_ps(a, kDistance == 2 ? 0x4E : 0xB1);
}

#elif defined(BEZEL_NEON)

using F = float32x4_t;
using I = int32x4_t;
using M = uint32x4_t;
constexpr int kWidth = 4;

BEZEL_OP F load(const float* p) { return vld1q_f32(p); }
BEZEL_OP void store(float* p, F a) { vst1q_f32(p, a); }
BEZEL_OP void store(int32_t* p, I a) { vst1q_s32(p, a); }
BEZEL_OP F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
BEZEL_OP void store_half(uint16_t* p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
BEZEL_OP F set(float x) { return vdupq_n_f32(x); }
BEZEL_OP I set(int32_t x) { return vdupq_n_s32(x); }
BEZEL_OP F add(F a, F b) { return vaddq_f32(a, b); }
BEZEL_OP F sub(F a, F b) { return vsubq_f32(a, b); }
BEZEL_OP F mul(F a, F b) { return vmulq_f32(a, b); }
BEZEL_OP F div(F a, F b) { return vdivq_f32(a, b); }
BEZEL_OP F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
BEZEL_OP F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
BEZEL_OP F max(F a, F b) { return vmaxq_f32(a, b); }
BEZEL_OP M less(F a, F b) { return vcltq_f32(a, b); }
BEZEL_OP F select(M m, F yes, F no) { return vbslq_f32(m, yes, no); }
BEZEL_OP I add(I a, I b) { return vaddq_s32(a, b); }
BEZEL_OP I sub(I a, I b) { return vsubq_s32(a, b); }
BEZEL_OP I max(I a, I b) { return vmaxq_s32(a, b); }
BEZEL_OP I min(I a, I b) { return vminq_s32(a, b); }
BEZEL_OP I band(I a, I b) { return vandq_s32(a, b); }
BEZEL_OP I bor(I a, I b) { return vorrq_s32(a, b); }
template <int kBits>
BEZEL_OP I shift_left(I a) { return vshlq_n_s32(a, kBits); }
BEZEL_OP I bits(F a) { return vreinterpretq_s32_f32(a); }
BEZEL_OP F from_bits(I a) { return vreinterpretq_f32_s32(a); }
BEZEL_OP I round(F a) { return vcvtnq_s32_f32(a); }
BEZEL_OP F to_float(I a) { return vcvtq_f32_s32(a); }
template <int kDistance>
BEZEL_OP F swap(F a) {
  if constexpr (kDistance == 2) return vextq_f32(a, a, 2);
  else return vrev64q_f32(a);
}

#else

using F = float;
using I = int32_t;
using M = bool;
constexpr int kWidth = 1;

BEZEL_OP I bits(F a) {
  I b;
  std::memcpy(&b, &a, sizeof b);
  return b;
}
BEZEL_OP F from_bits(I a) {
  F b;
  std::memcpy(&b, &a, sizeof b);
  return b;
}
BEZEL_OP I wrap(uint32_t a) { return static_cast<I>(a); }  // integers wrap around, as those of a register do
BEZEL_OP F load(const float* p) { return *p; }
BEZEL_OP void store(float* p, F a) { *p = a; }
BEZEL_OP void store(int32_t* p, I a) { *p = a; }
BEZEL_OP F load_half(const uint16_t* p) {
  const uint32_t exponent = *p >> 10 & 31, mantissa = *p & 1023, sign = static_cast<uint32_t>(*p >> 15) << 31;
  float value = static_cast<float>(mantissa) * 0x1p-24f;
  if (exponent == 31) value = from_bits(wrap(0x7F800000u | mantissa << 13 | (mantissa != 0) << 22));
  else if (exponent != 0) value = from_bits(wrap((exponent + 112) << 23 | mantissa << 13));
  return from_bits(wrap(static_cast<uint32_t>(bits(value)) | sign));
}
BEZEL_OP void store_half(uint16_t* p, F a) {
  const uint32_t all = static_cast<uint32_t>(bits(a)), magnitude = all & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | (magnitude >> 13 & 0x3FFu);
  } else if (magnitude < 0x38800000u) {  // below the normal range of float16: the addition rounds at 2^-24
    half = static_cast<uint32_t>(bits(from_bits(wrap(magnitude)) + 0.5f)) & 0x7FFu;
  } else {  // to nearest even by a carry into the exponent; 65520 and above to infinity
    half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    if (half > 0x7C00u) half = 0x7C00u;
  }
  *p = static_cast<uint16_t>(all >> 16 & 0x8000u) | static_cast<uint16_t>(half);
}
BEZEL_OP F set(float x) { return x; }
BEZEL_OP I set(int32_t x) { return x; }
BEZEL_OP F add(F a, F b) { return a + b; }
BEZEL_OP F sub(F a, F b) { return a - b; }
BEZEL_OP F mul(F a, F b) { return a * b; }
BEZEL_OP F div(F a, F b) { return a / b; }
BEZEL_OP F fma(F a, F b, F c) { return fmaf(a, b, c); }
BEZEL_OP F fnma(F a, F b, F c) { return fmaf(-a, b, c); }
BEZEL_OP F max(F a, F b) { return a > b ? a : b; }
BEZEL_OP M less(F a, F b) { return a < b; }
BEZEL_OP F select(M m, F yes, F no) { return m ? yes : no; }
BEZEL_OP I add(I a, I b) { return wrap(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
BEZEL_OP I sub(I a, I b) { return wrap(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
BEZEL_OP I max(I a, I b) { return a > b ? a : b; }
BEZEL_OP I min(I a, I b) { return a < b ? a : b; }
BEZEL_OP I band(I a, I b) { return a & b; }
BEZEL_OP I bor(I a, I b) { return a | b; }
template <int kBits>
BEZEL_OP I shift_left(I a) { return wrap(static_cast<uint32_t>(a) << kBits); }
BEZEL_OP I round(F a) { return a >= -0x1p31f && a < 0x1p31f ? static_cast<I>(lrintf(a)) : INT32_MIN; }
BEZEL_OP F to_float(I a) { return static_cast<F>(a); }
template <int kDistance>
BEZEL_OP F swap(F a) {
  return a;  // one lane: no call has a distance within it
}

#endif

}  // namespace part

constexpr int kParts = kLanes / part::kWidth;

struct F {
  part::F p[kParts];
};
struct I {
  part::I p[kParts];
};
struct M {
  part::M p[kParts];
};

#define BEZEL_EACH(Type, expression)                     \
  Type r;                                                \
  BEZEL_UNROLL                                           \
  for (int i = 0; i < kParts; ++i) r.p[i] = expression; \
  return r

BEZEL_OP F load(const float* x) { BEZEL_EACH(F, part::load(x + i * part::kWidth)); }
BEZEL_OP F load_half(const uint16_t* x) { BEZEL_EACH(F, part::load_half(x + i * part::kWidth)); }
BEZEL_OP F set(float x) { BEZEL_EACH(F, part::set(x)); }
BEZEL_OP I set(int32_t x) { BEZEL_EACH(I, part::set(x)); }
BEZEL_OP F add(F a, F b) { BEZEL_EACH(F, part::add(a.p[i], b.p[i])); }
BEZEL_OP F sub(F a, F b) { BEZEL_EACH(F, part::sub(a.p[i], b.p[i])); }
BEZEL_OP F mul(F a, F b) { BEZEL_EACH(F, part::mul(a.p[i], b.p[i])); }
BEZEL_OP F div(F a, F b) { BEZEL_EACH(F, part::div(a.p[i], b.p[i])); }
BEZEL_OP F fma(F a, F b, F c) { BEZEL_EACH(F, part::fma(a.p[i], b.p[i], c.p[i])); }    // a · b + c
BEZEL_OP F fnma(F a, F b, F c) { BEZEL_EACH(F, part::fnma(a.p[i], b.p[i], c.p[i])); }  // c − a · b
BEZEL_OP F max(F a, F b) { BEZEL_EACH(F, part::max(a.p[i], b.p[i])); }
BEZEL_OP M less(F a, F b) { BEZEL_EACH(M, part::less(a.p[i], b.p[i])); }
BEZEL_OP F select(M m, F yes, F no) { BEZEL_EACH(F, part::select(m.p[i], yes.p[i], no.p[i])); }
BEZEL_OP I add(I a, I b) { BEZEL_EACH(I, part::add(a.p[i], b.p[i])); }
BEZEL_OP I sub(I a, I b) { BEZEL_EACH(I, part::sub(a.p[i], b.p[i])); }
BEZEL_OP I max(I a, I b) { BEZEL_EACH(I, part::max(a.p[i], b.p[i])); }
BEZEL_OP I min(I a, I b) { BEZEL_EACH(I, part::min(a.p[i], b.p[i])); }
BEZEL_OP I band(I a, I b) { BEZEL_EACH(I, part::band(a.p[i], b.p[i])); }
BEZEL_OP I bor(I a, I b) { BEZEL_EACH(I, part::bor(a.p[i], b.p[i])); }
template <int kBits>
BEZEL_OP I shift_left(I a) { BEZEL_EACH(I, part::shift_left<kBits>(a.p[i])); }
BEZEL_OP I bits(F a) { BEZEL_EACH(I, part::bits(a.p[i])); }
BEZEL_OP F from_bits(I a) { BEZEL_EACH(F, part::from_bits(a.p[i])); }
BEZEL_OP I round(F a) { BEZEL_EACH(I, part::round(a.p[i])); }  // to nearest, ties to even
BEZEL_OP F to_float(I a) { BEZEL_EACH(F, part::to_float(a.p[i])); }

// Each lane takes the place of the one at kDistance, a power of two: lane i of the result is lane i xor kDistance.
template <int kDistance>
BEZEL_OP F swap(F a) {
  if constexpr (kDistance >= part::kWidth) {
    BEZEL_EACH(F, a.p[i ^ (kDistance / part::kWidth)]);
  } else {
    BEZEL_EACH(F, part::swap<kDistance>(a.p[i]));
  }
}

#undef BEZEL_EACH

BEZEL_OP void store(float* x, F a) {
  BEZEL_UNROLL
  for (int i = 0; i < kParts; ++i) part::store(x + i * part::kWidth, a.p[i]);
}
BEZEL_OP void store(int32_t* x, I a) {
  BEZEL_UNROLL
  for (int i = 0; i < kParts; ++i) part::store(x + i * part::kWidth, a.p[i]);
}
BEZEL_OP void store_half(uint16_t* x, F a) {
  BEZEL_UNROLL
  for (int i = 0; i < kParts; ++i) part::store_half(x + i * part::kWidth, a.p[i]);
}

// The first n lanes; the others are zero, or are not stored.
BEZEL_OP F load(const float* x, int64_t n) {
  if (n >= kLanes) return load(x);
  float lanes[kLanes] = {};
  std::memcpy(lanes, x, static_cast<size_t>(n) * sizeof *x);
  return load(lanes);
}
BEZEL_OP void store(float* x, F a, int64_t n) {
  if (n >= kLanes) return store(x, a);
  float lanes[kLanes];
  store(lanes, a);
  std::memcpy(x, lanes, static_cast<size_t>(n) * sizeof *x);
}

// Lanes i and i + 8 first, then i + 4, i + 2, i + 1.
BEZEL_OP float sum(F a) {
  float x[kLanes];
  store(x, a);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}
BEZEL_OP float largest(F a) {
  float x[kLanes];
  store(x, a);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}
BEZEL_OP int32_t largest(I a) {
  int32_t x[kLanes];
  store(x, a);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}

BEZEL_OP void prefetch(const char* p) {
#if defined(BEZEL_AVX512) || defined(BEZEL_AVX2)
  _mm_prefetch(p, _MM_HINT_T0);
#elif defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

// As integers, magnitudes keep their order, and infinity and NaN come out on top.
BEZEL_OP I magnitude_bits(F a) { return band(bits(a), set(int32_t{0x7FFFFFFF})); }

BEZEL_OP float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace
}  // namespace bezel
