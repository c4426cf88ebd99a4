// The primitives of 256 bits. Included with BEZEL_AVXVNNI 0 or 1: whether there is an instruction for int8
// dot products, or they are made of pairs in 16 bits.
#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstring>

#include "linear/linear_inline.h"
#include "linear/linear_kernels.h"

namespace bezel {
namespace {

constexpr int kLanes = 2;
#ifdef BEZEL_SMALL_TILES  // see linear_avx512vnni.cpp
constexpr int kTileTokens = 2;
#else
constexpr int kTileTokens = 4;
#endif
constexpr bool kSignedCodes = !BEZEL_AVXVNNI;
constexpr bool kNarrowSums = !BEZEL_AVXVNNI;
using I = __m256i;
using F = __m256;

BEZEL_INLINE I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
BEZEL_INLINE void store(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
BEZEL_INLINE I and_(I a, I b) { return _mm256_and_si256(a, b); }
BEZEL_INLINE I or_(I a, I b) { return _mm256_or_si256(a, b); }
BEZEL_INLINE I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
BEZEL_INLINE I add32(I a, I b) { return _mm256_add_epi32(a, b); }
BEZEL_INLINE I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
template <int n>
BEZEL_INLINE I shl(I v) {
  return _mm256_slli_epi32(v, n);
}
template <int n>
BEZEL_INLINE I shr(I v) {
  return _mm256_srli_epi32(v, n);
}
template <int n>
BEZEL_INLINE I sar(I v) {
  return _mm256_srai_epi32(v, n);
}
BEZEL_INLINE I bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
BEZEL_INLINE I words(int v) { return _mm256_set1_epi32(v); }
BEZEL_INLINE I lo32(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
BEZEL_INLINE I hi32(I a, I b) { return _mm256_unpackhi_epi32(a, b); }
BEZEL_INLINE I lo64(I a, I b) { return _mm256_unpacklo_epi64(a, b); }
BEZEL_INLINE I hi64(I a, I b) { return _mm256_unpackhi_epi64(a, b); }

BEZEL_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

BEZEL_INLINE I load_rows(const uint8_t* p, int64_t row_bytes) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p)), load16(p + 4 * row_bytes), 1);
}

BEZEL_INLINE I splat16(const int8_t* p) { return _mm256_broadcastsi128_si256(load16(p)); }

BEZEL_INLINE I splat_word(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

BEZEL_INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }

BEZEL_INLINE F half(I v) {  // of the low half of each word
  const I low = and_(v, words(0xFFFF));
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  return _mm256_cvtph_ps(packed);
}

BEZEL_INLINE F bits(I v) { return _mm256_castsi256_ps(v); }
BEZEL_INLINE F halves(const uint16_t* p) { return _mm256_cvtph_ps(load16(p)); }
BEZEL_INLINE F zero() { return _mm256_setzero_ps(); }
BEZEL_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
BEZEL_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
BEZEL_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
BEZEL_INLINE F negative(F v) { return _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)); }
BEZEL_INLINE F splat(const float* p) { return _mm256_broadcast_ss(p); }
BEZEL_INLINE F load_float(const float* p) { return _mm256_loadu_ps(p); }
BEZEL_INLINE void store_float(float* p, F v) { _mm256_storeu_ps(p, v); }
BEZEL_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
BEZEL_INLINE void prefetch_near(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

// 16 where the bit of the column is set, of the two bytes of each lane that begin at byte kAt.
template <int kAt>
BEZEL_INLINE I fifth_bits(I v) {
  const I spread =
      _mm256_broadcastsi128_si256(_mm_set_epi32(0x01010101 * (kAt + 1), 0x01010101 * (kAt + 1),
                                                0x01010101 * kAt, 0x01010101 * kAt));
  const I bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
  return and_(_mm256_cmpeq_epi8(and_(_mm256_shuffle_epi8(v, spread), bit), bit), bytes(16));
}

// The byte of each lane's table at every index 0 … 15.
BEZEL_INLINE I look_up(I table, I index) { return _mm256_shuffle_epi8(table, index); }

// Integer dot products of four codes with four activations, word by word.
#if BEZEL_AVXVNNI
template <int kBits, int kSteps>
struct Sum {
  I v;

  BEZEL_INLINE void start() { v = _mm256_setzero_si256(); }
  BEZEL_INLINE void start(const int32_t* bias) { v = splat_word(bias); }
  BEZEL_INLINE void add(int, I w, I x) { v = _mm256_dpbusd_avx_epi32(v, w, x); }
  template <int k>
  BEZEL_INLINE void step(I w, const int8_t* x) {
    add(k, w, splat_word(x + 4 * k));
  }
  BEZEL_INLINE I total() const { return v; }
};
#else
// Pairs of products are added in 16 bits, which must not saturate: at most 2 · 127 · code each. Codes of 8
// bits are signed, and give their sign to the activation: 2 · 127 · 128.
template <int kBits, int kSteps>
struct Sum {
  static constexpr int kRoom = kBits == 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;  // steps that fit
  static constexpr int kGroup = kRoom < kSteps ? kRoom : kSteps;
  static_assert(kBits == 8 || kGroup * 2 * 127 * ((1 << kBits) - 1) <= 32767);
  I v, pairs;

  BEZEL_INLINE void start() { v = _mm256_setzero_si256(); }
  BEZEL_INLINE void start(const int32_t* bias) { v = splat_word(bias); }
  BEZEL_INLINE void add(int k, I w, I x) {
    I products;
    if constexpr (kBits == 8) products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    else products = _mm256_maddubs_epi16(w, x);
    pairs = k % kGroup == 0 ? products : _mm256_add_epi16(pairs, products);
    if (k % kGroup == kGroup - 1) v = add32(v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <int k>
  BEZEL_INLINE void step(I w, const int8_t* x) {
    add(k, w, splat_word(x + 4 * k));
  }
  BEZEL_INLINE I total() const { return v; }
};
#endif

BEZEL_INLINE int32_t top_word(I v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}

// The only sum over bytes is one of unsigned differences: of v + 128 from 0.
BEZEL_INLINE int32_t sum_of_bytes(__m128i v) {
  const __m128i sum = _mm_sad_epu8(_mm_xor_si128(v, _mm_set1_epi8(-128)), _mm_setzero_si128());
  return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 2) - 16 * 128;
}

void quantize(const float* x, int64_t blocks, int tokens, int8_t* q, float* d, int32_t* sums) noexcept {
  const I magnitude = words(0x7FFFFFFF);
  for (int64_t b = 0; b < blocks; ++b, x += 32, q += 32 * tokens, d += tokens, sums += 2 * tokens) {
    F v[4];
    I top = _mm256_setzero_si256();  // as integers, magnitudes keep their order, and infinity and NaN come
                                     // out on top
    for (int i = 0; i < 4; ++i) {
      v[i] = load_float(x + 8 * i);
      top = _mm256_max_epi32(top, and_(_mm256_castps_si256(v[i]), magnitude));
    }
    const int32_t max_bits = top_word(top);
    const bool finite = max_bits < 0x7F800000;
    float scale;
    std::memcpy(&scale, &max_bits, 4);
    scale /= 127.0f;
    const bool usable = finite && scale >= FLT_MIN;
    *d = usable ? scale : finite ? 0.0f : NAN;
    const F inverse = _mm256_set1_ps(usable ? 1.0f / scale : 0.0f);
    const I keep = words(usable ? -1 : 0);  // an infinity times zero is none
    for (int h = 0; h < 2; ++h) {
      const I a = and_(_mm256_cvtps_epi32(mul(v[2 * h], inverse)), keep);
      const I c = and_(_mm256_cvtps_epi32(mul(v[2 * h + 1], inverse)), keep);
      const I packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, c), 0xD8);
      const __m128i q16 =
          _mm_packs_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * h), q16);
      sums[h * tokens] = sum_of_bytes(q16);
    }
  }
}

}  // namespace
}  // namespace bezel

#include "linear/linear_vector.h"
