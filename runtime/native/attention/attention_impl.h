// The source of the attention kernels, compiled once for each instruction set (vector_*.cpp).
#pragma once

#include <cmath>

#include "attention/attention_kernels.h"
#include "simd/vector.h"
#include "simd/vector_math.h"

namespace bezel {
namespace {

constexpr int32_t kOperandMax = 32639;  // 127 · 256 + 127: both bytes of an operand fit int8
constexpr int64_t kPrefetch = 2048;     // bytes
constexpr float kSmallest = 0x1p-100f;  // a row of operands below this is taken for zeros: 1 / it is finite

// Each storage type brings the products of a panel's vectors with packed operands ("Op") of a few rows.

struct Floats {  // one slot or dimension a step
  using Op = F;
  using Acc = F;
  static constexpr int64_t kGroup = 1, kOperand = sizeof(float);
#if defined(BEZEL_AVX512)
  static constexpr int kVecs = 2, kRows = 12;
#elif defined(BEZEL_AVX2)
  static constexpr int kVecs = 1, kRows = 6;
#else
  static constexpr int kVecs = 1, kRows = 4;
#endif
  BEZEL_OP Op op(const char* p) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return set(x);
  }
  BEZEL_OP Acc zero() { return set(0.0f); }
  BEZEL_OP void accumulate(Acc& a, F x, Op op) { a = fma(x, op, a); }
  BEZEL_OP F finish(Acc a, int32_t) { return a; }
};

struct Single : Floats {
  static constexpr int64_t kElement = 4;
  using Vec = F;
  BEZEL_OP Vec load_vec(const char* p) { return load(reinterpret_cast<const float*>(p)); }
};

struct Half : Floats {
  static constexpr int64_t kElement = 2;
  using Vec = F;
  BEZEL_OP Vec load_vec(const char* p) { return load_half(reinterpret_cast<const uint16_t*>(p)); }
};

BEZEL_OP int32_t word(const char* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// int8 times integers of 16 bits, four slots or dimensions a step, exact. With a dot product of bytes an operand is
// its high byte and its low byte, 256 · high + low; else it is an int16.
struct Int8 {
  static constexpr int64_t kElement = 1, kGroup = 4, kOperand = 2;
  static constexpr int32_t kBias = 128;

#if defined(BEZEL_AVX512) || defined(BEZEL_AVXVNNI)

#if defined(BEZEL_AVX512)
  static constexpr int kVecs = 4, kRows = 3;
  BEZEL_OP part::I load_part(const char* p) { return _mm512_loadu_si512(p); }
#else
  static constexpr int kVecs = 1, kRows = 3;
  BEZEL_OP part::I load_part(const char* p) { return _mm256_loadu_si256((const __m256i*)p); }
#endif
  BEZEL_OP part::I dot(part::I a, part::I x, part::I y) {
#if defined(__GNUC__) && !defined(__clang__)
    // GCC 12 has its intrinsic copy every accumulator twice, and spills some: half the speed.
#if defined(BEZEL_AVX512)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(a) : "v"(x), "v"(y));
#else
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(a) : "x"(x), "x"(y));
#endif
    return a;
#elif defined(BEZEL_AVX512)
    return _mm512_dpbusd_epi32(a, x, y);
#else
    return _mm256_dpbusd_avx_epi32(a, x, y);
#endif
  }
  using Vec = I;
  struct Op {
    part::I high, low;
  };
  struct Acc {
    I high, low;
  };
  BEZEL_OP Vec load_vec(const char* p) {
    I r;
    BEZEL_UNROLL
    for (int i = 0; i < kParts; ++i) r.p[i] = load_part(p + i * part::kWidth * 4);
    return r;
  }
  BEZEL_OP Op op(const char* p) { return {part::set(word(p)), part::set(word(p + 4))}; }
  BEZEL_OP Acc zero() { return {set(0), set(0)}; }
  BEZEL_OP I dot(I a, Vec x, part::I y) {
    BEZEL_UNROLL
    for (int i = 0; i < kParts; ++i) a.p[i] = dot(a.p[i], x.p[i], y);
    return a;
  }
  BEZEL_OP void accumulate(Acc& a, Vec x, Op op) {
    a.high = dot(a.high, x, op.high);
    a.low = dot(a.low, x, op.low);
  }
  BEZEL_OP F finish(Acc a, int32_t bias) {
    return to_float(sub(add(shift_left<8>(a.high), a.low), set(bias)));
  }

#elif defined(BEZEL_AVX2)

  static constexpr int kVecs = 1, kRows = 2;
  struct Vec {
    const char* p;  // widened where it is used: there are too few registers to hold it
  };
  using Op = __m256i;
  struct Acc {
    __m256i pairs[4];  // four slots each, the products of two dimensions beside those of the two others
  };
  BEZEL_OP Vec load_vec(const char* p) { return {p}; }
  BEZEL_OP Op op(const char* p) {
    int64_t x;
    std::memcpy(&x, p, sizeof x);
    return _mm256_set1_epi64x(x);
  }
  BEZEL_OP Acc zero() {
    const __m256i z = _mm256_setzero_si256();
    return {{z, z, z, z}};
  }
  BEZEL_OP void accumulate(Acc& a, const Vec& x, const Op& op) {
    BEZEL_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(x.p + 16 * i)));
      a.pairs[i] = _mm256_add_epi32(a.pairs[i], _mm256_madd_epi16(wide, op));
    }
  }
  BEZEL_OP F finish(const Acc& a, int32_t bias) {
    I r;
    for (int i = 0; i < 2; ++i)
      r.p[i] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(a.pairs[2 * i], a.pairs[2 * i + 1]), 0xD8);
    return to_float(sub(r, set(bias)));
  }

#elif defined(BEZEL_NEON)

  static constexpr int kVecs = 1;
  struct Vec {
    int8x16_t p[4];
  };
  BEZEL_OP Vec load_vec(const char* p) {
    Vec r;
    for (int i = 0; i < 4; ++i)
      r.p[i] = vreinterpretq_s8_u8(
          veorq_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p) + 16 * i), vdupq_n_u8(0x80)));
    return r;
  }
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr int kRows = 2;
  struct Op {
    int8x16_t high, low;
  };
  struct Acc {
    I high, low;
  };
  BEZEL_OP Op op(const char* p) {
    return {vreinterpretq_s8_s32(vdupq_n_s32(word(p))), vreinterpretq_s8_s32(vdupq_n_s32(word(p + 4)))};
  }
  BEZEL_OP Acc zero() { return {set(0), set(0)}; }
  BEZEL_OP void accumulate(Acc& a, const Vec& x, const Op& op) {
    BEZEL_UNROLL
    for (int i = 0; i < 4; ++i) {
      a.high.p[i] = vdotq_s32(a.high.p[i], x.p[i], op.high);
      a.low.p[i] = vdotq_s32(a.low.p[i], x.p[i], op.low);
    }
  }
  BEZEL_OP F finish(const Acc& a, int32_t) { return to_float(add(shift_left<8>(a.high), a.low)); }
#else
  static constexpr int kRows = 1;
  using Op = int16x4_t;
  struct Acc {
    int32x4_t pairs[8];  // two slots each, the products of two dimensions beside those of the two others
  };
  BEZEL_OP Op op(const char* p) { return vld1_s16(reinterpret_cast<const int16_t*>(p)); }
  BEZEL_OP Acc zero() {
    Acc a;
    for (int32x4_t& pair : a.pairs) pair = vdupq_n_s32(0);
    return a;
  }
  BEZEL_OP void accumulate(Acc& a, const Vec& x, const Op& op) {
    BEZEL_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int16x8_t wide = vmovl_s8(i % 2 ? vget_high_s8(x.p[i / 2]) : vget_low_s8(x.p[i / 2]));
      const int32x4_t first = vmull_s16(vget_low_s16(wide), op), second = vmull_s16(vget_high_s16(wide), op);
      a.pairs[i] = vaddq_s32(a.pairs[i], vpaddq_s32(first, second));
    }
  }
  BEZEL_OP F finish(const Acc& a, int32_t) {
    I r;
    for (int i = 0; i < 4; ++i) r.p[i] = vpaddq_s32(a.pairs[2 * i], a.pairs[2 * i + 1]);
    return to_float(r);
  }
#endif

#else

  static constexpr int kVecs = 1, kRows = 1;
  using Vec = const uint8_t*;
  using Op = const char*;
  using Acc = I;
  BEZEL_OP Vec load_vec(const char* p) { return reinterpret_cast<const uint8_t*>(p); }
  BEZEL_OP Op op(const char* p) { return p; }
  BEZEL_OP Acc zero() { return set(0); }
  BEZEL_OP void accumulate(Acc& a, Vec x, Op op) {
    int16_t y[4];
    std::memcpy(y, op, sizeof y);
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) a.p[i] += (x[4 * i + j] - kBias) * y[j];
  }
  BEZEL_OP F finish(const Acc& a, int32_t) { return to_float(a); }

#endif

  // Sixteen operands to 32 bytes, four a step.
  BEZEL_OP void pack(I x, char* out) {
#if defined(BEZEL_AVX512)
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x.p[0], _mm512_set1_epi32(128)), 8);
    const __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(x.p[0]);
    _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi32(h, l));
    _mm_storeu_si128((__m128i*)(out + 16), _mm_unpackhi_epi32(h, l));
#elif defined(BEZEL_AVX2) && !defined(BEZEL_AVXVNNI)
    const __m256i both = _mm256_packs_epi32(x.p[0], x.p[1]);
    _mm256_storeu_si256((__m256i*)out, _mm256_permute4x64_epi64(both, 0xD8));
#else
    int32_t values[kLanes];
    store(values, x);
    for (int i = 0; i < kLanes; ++i) {
#if defined(BEZEL_AVXVNNI) || defined(__ARM_FEATURE_DOTPROD) && defined(BEZEL_NEON)
      char* step = out + i / 4 * 8 + i % 4;
      step[0] = static_cast<char>((values[i] + 128) >> 8);
      step[4] = static_cast<char>(values[i]);
#else
      const int16_t value = static_cast<int16_t>(values[i]);
      std::memcpy(out + 2 * i, &value, sizeof value);
#endif
    }
#endif
  }
};

// out[row][16 · vec …] = Σ over steps of panel vector · operand of the row.
template <class S, int kRows, int kVecs>
static void multiply(const char* panel, int64_t stride, int64_t steps, const char* ops, int64_t ops_stride,
                     const int32_t* bias, float* out, int64_t out_stride) {
  typename S::Acc acc[kRows][kVecs];
  BEZEL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    BEZEL_UNROLL
    for (int v = 0; v < kVecs; ++v) acc[r][v] = S::zero();
  }
  for (int64_t t = 0; t < steps; ++t, panel += stride, ops += S::kGroup * S::kOperand) {
    typename S::Vec x[kVecs];
    // One token streams the cache from memory, where asking ahead, past the end of a panel too, is worth a quarter.
    if constexpr (kRows <= 2) {
      BEZEL_UNROLL
      for (int64_t b = 0; b < kVecs * kLanes * S::kGroup * S::kElement; b += 64) prefetch(panel + kPrefetch + b);
    }
    BEZEL_UNROLL
    for (int v = 0; v < kVecs; ++v) x[v] = S::load_vec(panel + v * kLanes * S::kGroup * S::kElement);
    BEZEL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename S::Op op = S::op(ops + r * ops_stride);
      BEZEL_UNROLL
      for (int v = 0; v < kVecs; ++v) S::accumulate(acc[r][v], x[v], op);
    }
  }
  BEZEL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    BEZEL_UNROLL
    for (int v = 0; v < kVecs; ++v)
      store(out + r * out_stride + v * kLanes, S::finish(acc[r][v], bias[r]));
  }
}

// The same for `rows` ≤ kRows rows.
template <class S, int kRows, int kVecs>
static void multiply_rows(int64_t rows, const char* panel, int64_t stride, int64_t steps, const char* ops,
                          int64_t ops_stride, const int32_t* bias, float* out, int64_t out_stride) {
  if (rows == kRows)
    multiply<S, kRows, kVecs>(panel, stride, steps, ops, ops_stride, bias, out, out_stride);
  else if constexpr (kRows > 1)
    multiply_rows<S, kRows - 1, kVecs>(rows, panel, stride, steps, ops, ops_stride, bias, out, out_stride);
}

struct Span {
  int32_t first, last;
};

// What any of the rows sees.
static Span union_of(const int32_t* first, const int32_t* last, int64_t rows) {
  Span span{kSplit, 0};
  for (int64_t r = 0; r < rows; ++r) {
    if (first[r] >= last[r]) continue;
    if (first[r] < span.first) span.first = first[r];
    if (last[r] > span.last) span.last = last[r];
  }
  return span;
}

template <class S>
static void score(const SplitJob& j) {
  constexpr int64_t kPanel = S::kVecs * kLanes;
  const int64_t steps = j.dim / S::kGroup, ops_stride = j.dim * S::kOperand;
  for (int64_t k = 0; k < kSplit; k += kPanel)
    for (int64_t r = 0; r < j.rows; r += S::kRows) {
      const int64_t rows = j.rows - r < S::kRows ? j.rows - r : S::kRows;
      const Span seen = union_of(j.first + r, j.last + r, rows);
      if (seen.last <= k || seen.first >= k + kPanel) continue;
      multiply_rows<S, S::kRows, S::kVecs>(rows, j.keys + k * j.dim * S::kElement, kPanel * S::kGroup * S::kElement,
                                           steps, j.queries + r * ops_stride, ops_stride, j.query_bias + r,
                                           j.scores + r * kSplit + k, kSplit);
    }
}

// Row r's products become exp(score − max), 0 where it does not see.
static void soften(const SplitJob& j, int64_t r) {
  float* x = j.scores + r * kSplit;
  // The softmax of one token would leave the memory idle: it brings in the first of the values, 8 KB a row.
  const char* ahead = j.rows <= 2 ? j.values + r * 32 * kSplit : nullptr;
  const auto bring = [ahead](int64_t i) {
    if (ahead)
      for (int64_t b = 0; b < 256; b += 64) prefetch(ahead + 16 * i + b);
  };
  const int64_t first = j.first[r], last = j.last[r];
  if (first >= last) {
    std::memset(x, 0, kSplit * sizeof *x);
    j.sum[r] = 0.0f;
    return;
  }
  const int64_t begin = first / kLanes * kLanes, end = (last + kLanes - 1) / kLanes * kLanes;
  const F query_sum = set(static_cast<float>(j.query_bias[r] / Int8::kBias));
  const F factor = set(j.query_factors[r]), cap = set(j.cap), inverse = set(j.cap > 0 ? 1.0f / j.cap : 0.0f);
  for (int64_t i = begin; i < end; i += kLanes) {
    F s = load(x + i);
    if (j.key_scales) {
      const I both = bits(load(j.key_scales + i));
      const F offset = to_float(sub(band(both, set(255)), set(128)));
      s = mul(add(s, mul(offset, query_sum)), mul(from_bits(band(both, set(~255))), factor));
    } else {
      s = mul(s, factor);
    }
    if (j.cap > 0) s = mul(cap, tanh(mul(s, inverse)));
    store(x + i, s);
    bring(i);
  }
  for (int64_t i = begin; i < first; ++i) x[i] = float_of(static_cast<int32_t>(0xFF800000u));
  for (int64_t i = last; i < end; ++i) x[i] = float_of(static_cast<int32_t>(0xFF800000u));

  F top = load(x + begin);
  for (int64_t i = begin + kLanes; i < end; i += kLanes) top = max(top, load(x + i));
  j.max[r] = largest(top);
  const F m = set(j.max[r]);
  F total = set(0.0f);
  for (int64_t i = begin; i < end; i += kLanes) {
    const F p = exp_nonpositive(sub(load(x + i), m));
    total = add(total, p);
    store(x + i, p);
    bring(kSplit + i);
  }
  j.sum[r] = sum(total);
  std::memset(x, 0, static_cast<size_t>(begin) * sizeof *x);
  std::memset(x + end, 0, static_cast<size_t>(kSplit - end) * sizeof *x);
}

// n floats, a multiple of kLanes, to operands; x = operand · returned scale.
static float pack_row(const float* x, int64_t n, char* packed, int32_t* bias) {
  I top = set(0);
  for (int64_t i = 0; i < n; i += kLanes) top = max(top, magnitude_bits(load(x + i)));
  const float magnitude = float_of(largest(top));
  if (magnitude < kSmallest) {
    std::memset(packed, 0, static_cast<size_t>(n * Int8::kOperand));
    *bias = 0;
    return 0.0f;
  }
  const F inverse = set(static_cast<float>(kOperandMax) / magnitude);
  I total = set(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    const I q = round(mul(load(x + i), inverse));
    total = add(total, q);
    Int8::pack(q, packed + i * Int8::kOperand);
  }
  int32_t lanes[kLanes];
  store(lanes, total);
  uint32_t all = 0;
  for (const int32_t lane : lanes) all += static_cast<uint32_t>(lane);
  *bias = static_cast<int32_t>(all * Int8::kBias);
  return magnitude / static_cast<float>(kOperandMax);
}

template <class S>
static void attend_split(const SplitJob& j) noexcept {
  score<S>(j);
  int32_t bias[kMaxTileRows] = {};
  const char* weights = reinterpret_cast<const char*>(j.scores);
  for (int64_t r = 0; r < j.rows; ++r) {
    soften(j, r);
    j.weight_scale[r] = 1.0f;
    if constexpr (S::kGroup > 1) {
      float* x = j.scores + r * kSplit;
      for (int64_t i = 0; i < kSplit; i += kLanes) store(x + i, mul(load(x + i), load(j.value_scales + i)));
      // A slot that is not seen may hold a scale that is no number.
      for (int64_t i = 0; i < j.first[r]; ++i) x[i] = 0.0f;
      for (int64_t i = j.last[r]; i < kSplit; ++i) x[i] = 0.0f;
      j.weight_scale[r] = pack_row(x, kSplit, j.weights + r * kSplit * S::kOperand, bias + r);
      weights = j.weights;
    }
  }
  const int64_t ops_stride = kSplit * S::kOperand;
  constexpr int64_t kPanel = S::kVecs * kLanes;
  for (int64_t d = 0; d < j.dim; d += kPanel)
    for (int64_t r = 0; r < j.rows; r += S::kRows) {
      const int64_t rows = j.rows - r < S::kRows ? j.rows - r : S::kRows;
      const Span seen = union_of(j.first + r, j.last + r, rows);
      if (seen.first >= seen.last) continue;
      const int64_t from = seen.first / S::kGroup, to = (seen.last + S::kGroup - 1) / S::kGroup;
      const int64_t width = j.dim - d < kPanel ? j.dim - d : kPanel;  // of this panel
      const int64_t stride = width * S::kGroup * S::kElement;
      const char* panel = j.values + d * kSplit * S::kElement + from * stride;
      const char* ops = weights + r * ops_stride + from * S::kGroup * S::kOperand;
      float* out = j.mixed + r * j.dim + d;
      if (width == kPanel)
        multiply_rows<S, S::kRows, S::kVecs>(rows, panel, stride, to - from, ops, ops_stride, bias + r, out, j.dim);
      else
        for (int64_t v = 0; v < width; v += kLanes)
          multiply_rows<S, S::kRows, 1>(rows, panel + v * S::kGroup * S::kElement, stride, to - from, ops,
                                        ops_stride, bias + r, out + v, j.dim);
    }
}

static void pack_query_float(const float* x, int64_t dim, float scale, char* packed, float* factor,
                             int32_t* bias) noexcept {
  std::memcpy(packed, x, static_cast<size_t>(dim) * sizeof *x);
  *factor = scale;
  *bias = 0;
}

static void pack_query_int8(const float* x, int64_t dim, float scale, char* packed, float* factor,
                            int32_t* bias) noexcept {
  *factor = pack_row(x, dim, packed, bias) * scale;
}

static void merge(float* total, float* max_so_far, float* sum_so_far, const float* mixed, float mixed_scale,
                  float mixed_max, float mixed_sum, int64_t dim) noexcept {
  const float top = mixed_max > *max_so_far ? mixed_max : *max_so_far;
  float change[kLanes] = {*max_so_far - top, mixed_max - top};
  store(change, exp_nonpositive(load(change)));
  const F keep = set(change[0]), take = set(change[1] * mixed_scale);
  for (int64_t i = 0; i < dim; i += kLanes)
    store(total + i, fma(load(mixed + i), take, mul(load(total + i), keep)));
  *sum_so_far = *sum_so_far * change[0] + mixed_sum * change[1];
  *max_so_far = top;
}

static void finish(const float* total, float sum_of_weights, int64_t n, float* out) noexcept {
  const F all = set(sum_of_weights);
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, div(load(total + i), all), n - i);
}

// In place of each two lanes at kDistance their sum and their difference.
template <int kDistance>
BEZEL_OP F butterfly(F x) {
  alignas(64) float signs[kLanes];
  BEZEL_UNROLL
  for (int i = 0; i < kLanes; ++i) signs[i] = i & kDistance ? -1.0f : 1.0f;
  return add(mul(x, load(signs)), swap<kDistance>(x));
}

// Sums and differences at the distances n / 2, n / 4 … 1, in this order.
static void hadamard(float* x, int64_t n) noexcept {
  const float scale = sqrtf(1.0f / static_cast<float>(n));
  if (n < kLanes) {
    for (int64_t distance = n / 2; distance > 0; distance /= 2)
      for (int64_t i = 0; i < n; ++i) {
        if (i & distance) continue;
        const float a = x[i], b = x[i + distance];
        x[i] = a + b;
        x[i + distance] = a - b;
      }
    for (int64_t i = 0; i < n; ++i) x[i] *= scale;
    return;
  }
  for (int64_t distance = n / 2; distance >= kLanes; distance /= 2)
    for (int64_t block = 0; block < n; block += 2 * distance)
      for (int64_t i = block; i < block + distance; i += kLanes) {
        const F a = load(x + i), b = load(x + i + distance);
        store(x + i, add(a, b));
        store(x + i + distance, sub(a, b));
      }
  for (int64_t i = 0; i < n; i += kLanes)
    store(x + i, mul(butterfly<1>(butterfly<2>(butterfly<4>(butterfly<8>(load(x + i))))), set(scale)));
}

// q = x / step to the nearest, ties to even, − offset, from `lowest` to 127.
static void store_codes(const float* x, int64_t n, float step, int32_t offset, int32_t lowest, int8_t* q) noexcept {
  int32_t lanes[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const I code = sub(round(div(load(x + i, n - i), set(step))), set(offset));
    store(lanes, min(max(code, set(lowest)), set(127)));
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    for (int64_t l = 0; l < left; ++l) q[i + l] = static_cast<int8_t>(lanes[l]);
  }
}

static void quantize(const float* x, int64_t n, int8_t* q, float* scale) noexcept {
  I top = set(0);
  for (int64_t i = 0; i < n; i += kLanes) top = max(top, magnitude_bits(load(x + i, n - i)));
  const int32_t magnitude = largest(top);
  *scale = float_of(magnitude) / 127.0f;
  if (!(*scale > 0.0f) || magnitude >= 0x7F800000) {
    std::memset(q, 0, static_cast<size_t>(n));
    return;
  }
  // A subnormal scale is so coarse that the quotient may pass 127.
  store_codes(x, n, *scale, 0, -127, q);
}

static void quantize_key(const float* x, int64_t n, int8_t* q, float* scale) noexcept {
  I top = set(0);
  F high = set(x[0]), low = set(-x[0]);
  for (int64_t i = 0; i < n; i += kLanes) {
    top = max(top, magnitude_bits(load(x + i, n - i)));
    F part = load(x + i, n - i);
    if (n - i < kLanes) {  // filled up with a number of the head's own: a zero may lie outside of its range
      alignas(64) float padded[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) padded[l] = x[i + l < n ? i + l : 0];
      part = load(padded);
    }
    high = max(high, part);
    low = max(low, sub(set(0.0f), part));
  }
  const int32_t magnitude = largest(top);
  const float above = largest(high), below = -largest(low);
  const float range = (above - below) / 254.0f, middle = fabsf(above + below) / 252.0f;
  float step = range > middle ? range : middle;  // so that the offset fits its byte, too
  if (magnitude >= 0x7F800000) step = float_of(magnitude);
  int32_t rounded = 0;
  std::memcpy(&rounded, &step, sizeof step);
  const bool usable = step > 0.0f && rounded < 0x7F800000 - 255;
  if (usable) rounded = (rounded + 255) & ~255;
  step = float_of(rounded & ~255);
  float lanes_of_offset[kLanes] = {usable ? (above + below) * 0.5f / step + 0.5f : 0.0f};
  int32_t lanes[kLanes];
  store(lanes, round(load(lanes_of_offset)));
  const int32_t offset = lanes[0];
  *scale = float_of((rounded & ~255) | (offset + 128));
  if (!usable) {
    std::memset(q, 0, static_cast<size_t>(n));
    return;
  }
  store_codes(x, n, step, offset, -128, q);
}

static void to_half(const float* x, int64_t n, uint16_t* y) noexcept {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_half(y + i, load(x + i));
  if (i == n) return;
  uint16_t lanes[kLanes];
  store_half(lanes, load(x + i, n - i));
  std::memcpy(y + i, lanes, static_cast<size_t>(n - i) * sizeof *y);
}

template <class S>
constexpr KvKernels kv_kernels() {
  return {{S::kVecs * kLanes, S::kGroup, S::kElement},
          S::kOperand,
          S::kGroup > 1 ? pack_query_int8 : pack_query_float,
          attend_split<S>};
}

constexpr AttentionKernels kAttention = {{kv_kernels<Single>(), kv_kernels<Half>(), kv_kernels<Int8>()},
                                         merge, finish, hadamard, quantize, quantize_key, to_half};

}  // namespace
}  // namespace bezel
