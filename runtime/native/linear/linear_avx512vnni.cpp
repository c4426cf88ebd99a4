// AVX-512 F, BW, VL, DQ, VNNI.
#include "linear/linear_kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstring>

#include "linear/linear_inline.h"

namespace bezel {
namespace {

constexpr int kLanes = 4;
#ifdef BEZEL_SMALL_TILES  // under sanitizers: compilers take minutes for the code of larger ones, which is the same
constexpr int kTileTokens = 2;
#else
constexpr int kTileTokens = 12;
#endif
constexpr bool kSignedCodes = false;
constexpr bool kNarrowSums = false;
using I = __m512i;
using F = __m512;

BEZEL_INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
BEZEL_INLINE void store(void* p, I v) { _mm512_storeu_si512(p, v); }
BEZEL_INLINE I and_(I a, I b) { return _mm512_and_si512(a, b); }
BEZEL_INLINE I or_(I a, I b) { return _mm512_or_si512(a, b); }
BEZEL_INLINE I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
BEZEL_INLINE I add32(I a, I b) { return _mm512_add_epi32(a, b); }
BEZEL_INLINE I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
template <int n>
BEZEL_INLINE I shl(I v) {
  return _mm512_slli_epi32(v, n);
}
template <int n>
BEZEL_INLINE I shr(I v) {
  return _mm512_srli_epi32(v, n);
}
template <int n>
BEZEL_INLINE I sar(I v) {
  return _mm512_srai_epi32(v, n);
}
BEZEL_INLINE I bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
BEZEL_INLINE I words(int v) { return _mm512_set1_epi32(v); }
BEZEL_INLINE I lo32(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
BEZEL_INLINE I hi32(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
BEZEL_INLINE I lo64(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
BEZEL_INLINE I hi64(I a, I b) { return _mm512_unpackhi_epi64(a, b); }

BEZEL_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

BEZEL_INLINE I load_rows(const uint8_t* p, int64_t row_bytes) {
  I v = _mm512_castsi128_si512(load16(p));
  v = _mm512_inserti32x4(v, load16(p + 4 * row_bytes), 1);
  v = _mm512_inserti32x4(v, load16(p + 8 * row_bytes), 2);
  return _mm512_inserti32x4(v, load16(p + 12 * row_bytes), 3);
}

BEZEL_INLINE I splat16(const int8_t* p) { return _mm512_broadcast_i32x4(load16(p)); }

BEZEL_INLINE I splat_word(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

BEZEL_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
BEZEL_INLINE F half(I v) {
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}  // of the low half of each word
BEZEL_INLINE F bits(I v) { return _mm512_castsi512_ps(v); }
BEZEL_INLINE F halves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
BEZEL_INLINE F zero() { return _mm512_setzero_ps(); }
BEZEL_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
BEZEL_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
BEZEL_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
BEZEL_INLINE F negative(F v) { return _mm512_xor_ps(v, _mm512_set1_ps(-0.0f)); }
BEZEL_INLINE F splat(const float* p) { return _mm512_set1_ps(*p); }
BEZEL_INLINE F load_float(const float* p) { return _mm512_loadu_ps(p); }
BEZEL_INLINE void store_float(float* p, F v) { _mm512_storeu_ps(p, v); }
BEZEL_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
BEZEL_INLINE void prefetch_near(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

// 16 where the bit of the column is set, of the two bytes of each lane that begin at byte kAt.
template <int kAt>
BEZEL_INLINE I fifth_bits(I v) {
  const I spread = _mm512_set4_epi32(0x01010101 * (kAt + 1), 0x01010101 * (kAt + 1),
                                     0x01010101 * kAt, 0x01010101 * kAt);
  const __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(v, spread),
                                              _mm512_set1_epi64(static_cast<long long>(0x8040201008040201u)));
  return _mm512_maskz_mov_epi8(set, bytes(16));
}

// The byte of each lane's table at every index 0 … 15.
BEZEL_INLINE I look_up(I table, I index) { return _mm512_shuffle_epi8(table, index); }

// Integer dot products of four codes with four activations, word by word.
template <int kBits, int kSteps>
struct Sum {
  I v;

  BEZEL_INLINE void start() { v = _mm512_setzero_si512(); }
  BEZEL_INLINE void start(const int32_t* bias) { v = splat_word(bias); }
  BEZEL_INLINE void add(int, I w, I x) { v = _mm512_dpbusd_epi32(v, w, x); }
  template <int k>
  BEZEL_INLINE void step(I w, const int8_t* x) {
    add(k, w, splat_word(x + 4 * k));
  }
  BEZEL_INLINE I total() const { return v; }
};

void quantize(const float* x, int64_t blocks, int tokens, int8_t* q, float* d, int32_t* sums) noexcept {
  const I magnitude = words(0x7FFFFFFF);
  for (int64_t b = 0; b < blocks; ++b, x += 32, q += 32 * tokens, d += tokens, sums += 2 * tokens) {
    const F lo = load_float(x), hi = load_float(x + 16);
    // As integers, magnitudes keep their order, and infinity and NaN come out on top.
    const int32_t top = _mm512_reduce_max_epi32(
        _mm512_max_epi32(and_(_mm512_castps_si512(lo), magnitude), and_(_mm512_castps_si512(hi), magnitude)));
    const bool finite = top < 0x7F800000;
    float scale;
    std::memcpy(&scale, &top, 4);
    scale /= 127.0f;
    const bool usable = finite && scale >= FLT_MIN;
    *d = usable ? scale : finite ? 0.0f : NAN;
    const F inverse = _mm512_set1_ps(usable ? 1.0f / scale : 0.0f);
    const __mmask16 keep = static_cast<__mmask16>(usable ? 0xFFFF : 0);  // an infinity times zero is none
    for (int h = 0; h < 2; ++h) {
      const __m128i v = _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(keep, mul(h == 0 ? lo : hi, inverse)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * h), v);
      // The only sum over bytes is one of unsigned differences: of v + 128 from 0.
      const __m128i sum = _mm_sad_epu8(_mm_xor_si128(v, _mm_set1_epi8(-128)), _mm_setzero_si128());
      sums[h * tokens] = _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 2) - 16 * 128;
    }
  }
}

}  // namespace
}  // namespace bezel

#include "linear/linear_vector.h"

namespace bezel {
const LinearKernels& linear_avx512vnni() noexcept {
  static constexpr LinearKernels kernels = vector_table();
  return kernels;
}
}  // namespace bezel
#endif
