// NEON with SDOT and SMMLA. A product of two rows' and two tokens' eight columns is one instruction; what is
// not a product of many tokens is SDOT's.
#if defined(__aarch64__) || defined(_M_ARM64)
#define BEZEL_DOT 1
#include "linear/linear_neon.h"

namespace bezel {
namespace {

static_assert(kRows == 4 && kTileTokens == 8);

// Eight columns of rows 0 and 1, of rows 2 and 3, then the other eight. Their zero point goes here, once for
// all tokens.
template <int kZero>
BEZEL_INLINE Rows paired(const Rows& r) {
  const Rows signed_codes = each(r, [](I v) BEZEL_LAMBDA {
    return vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(v), vdupq_n_s8(kZero)));
  });
  const I* const v = signed_codes.v;
  return {{lo64(v[0], v[1]), lo64(v[2], v[3]), hi64(v[0], v[1]), hi64(v[2], v[3])}};
}

// Two tokens' 32 columns, eight at a time in turn. The last token of an odd number stays as it is.
void arrange(int8_t* q, int64_t blocks, int tokens) noexcept {
  for (int64_t b = 0; b < blocks; ++b, q += tokens % 2 * 32)
    for (int t = 0; t + 1 < tokens; t += 2, q += 64) {
      const I a = load(q), b16 = load(q + 16), c = load(q + 32), d = load(q + 48);
      store(q, lo64(a, c));
      store(q + 16, hi64(a, c));
      store(q + 32, lo64(b16, d));
      store(q + 48, hi64(b16, d));
    }
}

BEZEL_INLINE I product(I sum, I rows, I tokens) {
  return vmmlaq_s32(sum, vreinterpretq_s8_s32(rows), vreinterpretq_s8_s32(tokens));
}

// The 8 bytes at `p`, twice.
BEZEL_INLINE I twice(const void* p) {
  int64_t word;
  std::memcpy(&word, p, 8);
  return vreinterpretq_s32_s64(vdupq_n_s64(word));
}

// Sums of two rows and two tokens are a vector: r0t0 r0t1 r1t0 r1t1. A single last token stands in both places.
template <int kSub, bool kMinimum, int kTokens>
void gemm_pairs(const Panel& panel, int64_t blocks, const Tile& x, float* acc) {
  constexpr int kPairs = (kTokens + 1) / 2;
  constexpr auto single = [](int pair) { return 2 * pair + 1 == kTokens; };
  const auto of_pair = [&](const float* values, auto t) BEZEL_LAMBDA {
    if constexpr (single(t.value)) return splat(values + 2 * t.value);
    else return bits(twice(values + 2 * t.value));
  };
  const uint8_t* codes = panel.codes;
  const float *scales = panel.scales, *minima = panel.minima, *dx = x.d;
  const float* moments = static_cast<const float*>(x.bias);
  const int8_t* q = x.q;
  F low[kPairs], high[kPairs];  // of rows 0 and 1, of rows 2 and 3
  repeat<kPairs>([&](auto t) BEZEL_LAMBDA {
    const F a = load_float(acc + 8 * t.value), b = single(t.value) ? a : load_float(acc + 8 * t.value + 4);
    low[t.value] = vzip1q_f32(a, b);
    high[t.value] = vzip2q_f32(a, b);
  });
  for (int64_t b = 0; b < blocks; ++b) {
    repeat<32 / kSub>([&](auto h) BEZEL_LAMBDA {
      I sum_low[kPairs], sum_high[kPairs];
      repeat<kPairs>([&](auto t) BEZEL_LAMBDA { sum_low[t.value] = sum_high[t.value] = words(0); });
      repeat<kSub / 8>([&](auto k) BEZEL_LAMBDA {
        const I w_low = load(codes + 32 * k.value), w_high = load(codes + 32 * k.value + 16);
        constexpr int kAt = decltype(h)::value * kSub / 8 + decltype(k)::value;
        repeat<kPairs>([&](auto t) BEZEL_LAMBDA {
          const int8_t* const pair = q + 64 * t.value;
          const I tokens = single(t.value) ? twice(pair + 8 * kAt) : load(pair + 16 * kAt);
          sum_low[t.value] = product(sum_low[t.value], w_low, tokens);
          sum_high[t.value] = product(sum_high[t.value], w_high, tokens);
        });
      });
      const F d = load_float(scales), d_low = vzip1q_f32(d, d), d_high = vzip2q_f32(d, d);
      repeat<kPairs>([&](auto t) BEZEL_LAMBDA {
        const F d_tokens = of_pair(dx, t);
        low[t.value] = fma(to_float(sum_low[t.value]), mul(d_low, d_tokens), low[t.value]);
        high[t.value] = fma(to_float(sum_high[t.value]), mul(d_high, d_tokens), high[t.value]);
      });
      if constexpr (kMinimum) {
        const F m = load_float(minima), m_low = vzip1q_f32(m, m), m_high = vzip2q_f32(m, m);
        repeat<kPairs>([&](auto t) BEZEL_LAMBDA {
          const F of_tokens = of_pair(moments, t);
          low[t.value] = fma(m_low, of_tokens, low[t.value]);
          high[t.value] = fma(m_high, of_tokens, high[t.value]);
        });
        minima += kRows;
        moments += kTokens;
      }
      codes += kSub * kRows;
      scales += kRows;
    });
    q += kTokens * 32;
    dx += kTokens;
  }
  repeat<kPairs>([&](auto t) BEZEL_LAMBDA {
    store_float(acc + 8 * t.value, vuzp1q_f32(low[t.value], high[t.value]));
    if (!single(t.value)) store_float(acc + 8 * t.value + 4, vuzp2q_f32(low[t.value], high[t.value]));
  });
}

template <int kSub, bool kMinimum>
void gemm_i8mm(const Panel& panel, int64_t blocks, const Tile& x, int tokens, float* acc) noexcept {
  with_tokens<kTileTokens>(
      tokens, [&](auto t) BEZEL_LAMBDA { gemm_pairs<kSub, kMinimum, decltype(t)::value>(panel, blocks, x, acc); });
}

template <class W>
constexpr void use_pairs(LinearKernels& k) {
  k.of[W::kType].unpack = unpack<W, paired<W::kZero>>;
  k.of[W::kType].gemm = gemm_i8mm<W::kSub, W::kMinimum>;
}

constexpr LinearKernels i8mm_table() {
  LinearKernels k = vector_table();
  k.arrange = arrange;
#define BEZEL_USE_PAIRS(format, ...) use_pairs<format>(k);
  BEZEL_BLOCK_FORMATS(BEZEL_USE_PAIRS)
#undef BEZEL_USE_PAIRS
  return k;
}

}  // namespace

const LinearKernels& linear_neoni8mm() noexcept {
  static constexpr LinearKernels kernels = i8mm_table();
  return kernels;
}

}  // namespace bezel
#endif
