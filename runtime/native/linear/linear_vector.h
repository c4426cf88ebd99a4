// The kernels of every vector instruction set, written once over primitives.
//
// An instruction set has vectors of kLanes lanes of 128 bits. A group is 4 · kLanes rows; row 4 l + i of it
// is at lane l of vector i. So 16 bytes of each row fill four vectors; transposing the 4 × 4 words of every
// lane makes vectors whose words are the rows, and so does the tree that adds up the four words of a lane.
// Scales are then applied with a row in each word, in the fixed order.
//
// Included by a file that has defined, in bezel's anonymous namespace: kLanes; the vectors I (integers) and F
// (float32); on I load store and_ or_ add32 sub32 shl<n> shr<n> sar<n> (32-bit words) bytes words lo32 hi32
// lo64 hi64 load_rows splat16; between them to_float half bits; on F zero mul add fma splat load_float
// store_float halves; prefetch prefetch_near; fifth_bits look_up; kSignedCodes; kNarrowSums; kTileTokens; Sum<bits, steps>;
// quantize.
#pragma once

#include <cstring>

#include "linear/linear_formats.h"

namespace bezel {
namespace {

// Fetches the unit of the group ahead, a share with every sub-block.
template <class W>
struct Ahead {
  static constexpr int kUnitBytes = kUnit * 32 / W::kBlock * W::kBytes, kShares = kUnit * 32 / W::kSub;
  const uint8_t* p;
  int64_t row_bytes;

  BEZEL_INLINE void fetch(int share) const {
    for (int r = share * kRows / kShares; r < (share + 1) * kRows / kShares; ++r)
      for (int i = 0; i < kUnitBytes; i += 64) prefetch(p + r * row_bytes + i);
  }
  // The shares of the sub-blocks that a unit of `blocks` blocks lacks.
  BEZEL_INLINE void fetch_rest(int blocks) const {
    if constexpr (W::kBlock == 32)
      for (int share = blocks; share < kShares; ++share) fetch(share);
  }
  BEZEL_INLINE void next() { p += kUnitBytes; }
};

// Goes through a group of rows by units, j counting the sub-blocks of a unit: on_codes(j, codes…) with 16 columns in
// each Rows, in any order; on_scales(j, scales) in order, when all codes are through or, at once, after those of the
// same sub-block; then on_unit().
template <class W, bool kAtOnce, class OnCodes, class OnScales, class OnUnit>
BEZEL_INLINE void walk(const Group& w, int64_t blocks, const OnCodes& on_codes, const OnScales& on_scales,
                       const OnUnit& on_unit) {
  constexpr int kUnitBytes = Ahead<W>::kUnitBytes, kShares = Ahead<W>::kShares;
  const uint8_t* data = w.data;
  Ahead<W> ahead{w.ahead, w.row_bytes};
  typename W::Scales::Ahead scales_ahead;
  scales_ahead.template collect<kUnitBytes>(data, w.row_bytes, blocks, 0, kRows);
  for (int64_t left = blocks; left > 0; left -= kUnit, data += kUnitBytes, ahead.next()) {
    const int count = W::kBlock == 32 && left < kUnit ? static_cast<int>(left) : kUnit;
    typename W::Scales scales;
    scales.collect(data, w.row_bytes, scales_ahead);
    ahead.fetch_rest(count);
    W::codes(data, w.row_bytes, count, scales, [&](int j, const auto&... codes) BEZEL_LAMBDA {
      ahead.fetch(j);
      scales_ahead.template collect<kUnitBytes>(data + kUnitBytes, w.row_bytes, left - kUnit, j * kRows / kShares,
                                                (j + 1) * kRows / kShares);
      on_codes(j, codes...);
      if constexpr (kAtOnce) on_scales(j, scales);
    });
    for (int j = 0; !kAtOnce && j < count * (32 / W::kSub); ++j) on_scales(j, scales);
    on_unit();
  }
}

// Σ code · q of a sub-block's columns for each token of a tile, and the bias where there is one.
template <class W, int kTokens, class... Second>
BEZEL_INLINE void dot_products(const int8_t* q, const int32_t* bias, I* dot, const Rows& first,
                               const Second&... second) {
  if constexpr (kTokens == 1) {  // whose sums are turned in fewer steps than the codes
    Rows lanes;
    repeat<4>([&](auto i) BEZEL_LAMBDA {
      Sum<W::kBits, W::kSub / 16> sum;
      sum.start();
      sum.add(0, first.v[i.value], splat16(q));
      (sum.add(1, second.v[decltype(i)::value], splat16(q + 16)), ...);
      lanes.v[i.value] = sum.total();
    });
    *dot = sum_of_words(lanes);
    if constexpr (!W::kMinimum) *dot = add32(*dot, splat_word(bias));
  } else {
    Sum<W::kBits, W::kSub / 4> sum[kTokens];
    repeat<kTokens>([&](auto t) BEZEL_LAMBDA {
      if constexpr (W::kMinimum) sum[t.value].start();
      else sum[t.value].start(bias + t.value);
    });
    const auto add = [&](auto half, const Rows& codes) BEZEL_LAMBDA {
      const Rows turned = transposed(codes);
      repeat<4>([&](auto i) BEZEL_LAMBDA {
        constexpr int k = 4 * decltype(half)::value + decltype(i)::value;
        repeat<kTokens>([&](auto t)
                            BEZEL_LAMBDA { sum[t.value].template step<k>(turned.v[i.value], q + t.value * 32); });
      });
    };
    add(Constant<0>{}, first);
    (add(Constant<1>{}, second), ...);
    repeat<kTokens>([&](auto t) BEZEL_LAMBDA { dot[t.value] = sum[t.value].total(); });
  }
}

template <class W, int kTokens>
void gemv_tile(const Group& w, int64_t blocks, const Tile& x, float* y) {
  constexpr int kSubs = 32 / W::kSub;  // of a block
  constexpr bool kAtOnce = W::kInOrder && kTokens > 4;  // for fewer it gains nothing, and costs AVX2 its registers
  const int8_t* q = x.q;
  const float* dx = x.d;
  const int32_t* bias = static_cast<const int32_t*>(x.bias);
  const float* moments = static_cast<const float*>(x.bias);
  F acc[kTokens];
  repeat<kTokens>([&](auto t) BEZEL_LAMBDA { acc[t.value] = zero(); });
  I dots[kAtOnce ? 1 : kUnit * kSubs][kTokens];
  walk<W, kAtOnce>(
      w, blocks,
      [&](int j, const auto&... codes) BEZEL_LAMBDA {
        dot_products<W, kTokens>(q + j / kSubs * kTokens * 32 + j % kSubs * W::kSub, bias + j * kTokens,
                                 dots[kAtOnce ? 0 : j], codes...);
      },
      [&](int j, const auto& scales) BEZEL_LAMBDA {
        const I* const dot = dots[kAtOnce ? 0 : j];
        const F d = scales.d(j);
        repeat<kTokens>([&](auto t) BEZEL_LAMBDA {
          const F scale = mul(d, splat(dx + j / kSubs * kTokens + t.value));
          acc[t.value] = fma(to_float(dot[t.value]), scale, acc[t.value]);
          if constexpr (W::kMinimum)
            acc[t.value] = fma(scales.m(j), splat(moments + j * kTokens + t.value), acc[t.value]);
        });
      },
      [&]() BEZEL_LAMBDA {
        q += kUnit * 32 * kTokens;
        dx += kUnit * kTokens;
        bias += kUnit * kSubs * kTokens;
        moments += kUnit * kSubs * kTokens;
      });
  repeat<kTokens>([&](auto t) BEZEL_LAMBDA { store_float(y + t.value * kRows, acc[t.value]); });
}

// Calls body with `tokens` as a constant: 1 … 4, or what else a tile may have.
template <int kMost, class Body>
BEZEL_INLINE void with_tokens(int tokens, const Body& body) {
  switch (tokens) {
    case 1: return body(Constant<1>{});
    case 2: return body(Constant<2>{});
    case 3:
      if constexpr (kMost >= 3) return body(Constant<3>{});
      break;
    case 4:
      if constexpr (kMost >= 4) return body(Constant<4>{});
      break;
    case 6:
      if constexpr (kMost >= 6) return body(Constant<6>{});
      break;
    case 8:
      if constexpr (kMost >= 8) return body(Constant<8>{});
      break;
    case 12:
      if constexpr (kMost >= 12) return body(Constant<12>{});
      break;
  }
}

template <class W>
void gemv(const Group& w, int64_t blocks, const Tile& x, int tokens, float* y) noexcept {
  with_tokens<kTileTokens>(tokens,
                           [&](auto t) BEZEL_LAMBDA { gemv_tile<W, decltype(t)::value>(w, blocks, x, y); });
}

// panel.codes: [column / 4][row][4], unless 16 columns are arranged in another way. Scales and minima:
// [sub-block][row].
template <class W, Rows (*kArranged)(const Rows&) = transposed>
void unpack(const Group& w, int64_t blocks, Panel& panel) noexcept {
  constexpr int kSubs = 32 / W::kSub;
  uint8_t* out = panel.codes;
  float* d = panel.scales;
  float* m = panel.minima;
  walk<W, false>(
      w, blocks,
      [&](int j, const auto&... codes) BEZEL_LAMBDA {
        uint8_t* to = out + j * W::kSub * kRows;
        const auto put = [&](const Rows& rows) BEZEL_LAMBDA {
          const Rows t = kArranged(rows);
          repeat<4>([&](auto i)
                        BEZEL_LAMBDA { store(to + decltype(i)::value * 4 * kRows, t.v[decltype(i)::value]); });
          to += 16 * kRows;
        };
        (put(codes), ...);
      },
      [&](int j, const auto& scales) BEZEL_LAMBDA {
        store_float(d + j * kRows, scales.d(j));
        if constexpr (W::kMinimum) store_float(m + j * kRows, scales.m(j));
      },
      [&]() BEZEL_LAMBDA {
        out += kUnit * 32 * kRows;
        d += kUnit * kSubs * kRows;
        m += kUnit * kSubs * kRows;
      });
}

template <int kBits, int kSub, bool kMinimum, int kTokens>
void gemm_tile(const Panel& panel, int64_t blocks, const Tile& x, float* acc) {
  const uint8_t* codes = panel.codes;
  const float *scales = panel.scales, *minima = panel.minima, *dx = x.d;
  const int8_t* q = x.q;
  const int32_t* bias = static_cast<const int32_t*>(x.bias);
  const float* moments = static_cast<const float*>(x.bias);
  F f[kTokens];
  repeat<kTokens>([&](auto t) BEZEL_LAMBDA { f[t.value] = load_float(acc + t.value * kRows); });
  for (int64_t b = 0; b < blocks; ++b) {
    repeat<32 / kSub>([&](auto h) BEZEL_LAMBDA {
      Sum<kBits, kSub / 4> sum[kTokens];
      repeat<kTokens>([&](auto t) BEZEL_LAMBDA {
        if constexpr (kMinimum) sum[t.value].start();
        else sum[t.value].start(bias + t.value);
      });
      repeat<kSub / 4>([&](auto k) BEZEL_LAMBDA {
        const I w = load(codes + k.value * 4 * kRows);
        repeat<kTokens>([&](auto t) BEZEL_LAMBDA {
          sum[t.value].template step<decltype(k)::value>(w, q + t.value * 32 + h.value * kSub);
        });
      });
      const F d = load_float(scales);
      repeat<kTokens>([&](auto t) BEZEL_LAMBDA {
        f[t.value] = fma(to_float(sum[t.value].total()), mul(d, splat(dx + t.value)), f[t.value]);
      });
      if constexpr (kMinimum) {
        const F m = load_float(minima);
        repeat<kTokens>([&](auto t)
                            BEZEL_LAMBDA { f[t.value] = fma(m, splat(moments + t.value), f[t.value]); });
      }
      codes += kSub * kRows;
      scales += kRows;
      minima += kRows;
      bias += kTokens;
      moments += kTokens;
    });
    q += kTokens * 32;
    dx += kTokens;
  }
  repeat<kTokens>([&](auto t) BEZEL_LAMBDA { store_float(acc + t.value * kRows, f[t.value]); });
}

template <int kBits, int kSub, bool kMinimum>
void gemm(const Panel& panel, int64_t blocks, const Tile& x, int tokens, float* acc) noexcept {
  with_tokens<kTileTokens>(tokens, [&](auto t) BEZEL_LAMBDA {
    gemm_tile<kBits, kSub, kMinimum, decltype(t)::value>(panel, blocks, x, acc);
  });
}

// ---- float32 activations.

template <class W>
void dequantize(const Group& w, int64_t cols, float* out) noexcept {
  Panel panel;
  const int64_t blocks = cols / 32;
  unpack<W>(w, blocks, panel);
  for (int64_t k = 0; k < cols / 4; ++k, out += 4 * kRows) {
    const int64_t j = k * 4 / W::kSub;
    const I codes = load(panel.codes + k * 4 * kRows);
    const F d = load_float(panel.scales + j * kRows);
    repeat<4>([&](auto i) BEZEL_LAMBDA {
      const I up = shl<24 - 8 * i.value>(codes);
      const I code = kSignedCodes ? sar<24>(up) : shr<24>(up);
      F value = mul(to_float(sub32(code, words(W::kZero))), d);
      if constexpr (W::kMinimum) value = add(value, load_float(panel.minima + j * kRows));
      store_float(out + i.value * kRows, value);
    });
  }
}

// A float type whose 16 bytes are kPer columns; `expand` turns a word of each row into its 4 / size columns.
template <int kSize, class Expand, class One>
BEZEL_INLINE void dequantize_floats(const Group& w, int64_t cols, float* out, const Expand& expand,
                                    const One& one) {
  constexpr int kPer = 16 / kSize;
  const uint8_t* data = w.data;
  int64_t c = 0;
  for (; c + kPer <= cols; c += kPer, data += 16) {
    const Rows t = transposed(rows16(data, w.row_bytes));
    repeat<4>([&](auto i) BEZEL_LAMBDA { expand(t.v[i.value], out + (c + i.value * kPer / 4) * kRows); });
    for (int i = 0; i < kRows * 16; i += 64) prefetch(w.ahead + (data - w.data) * kRows + i);
  }
  for (; c < cols; ++c, data += kSize)
    for (int r = 0; r < kRows; ++r) out[c * kRows + r] = one(data + r * w.row_bytes);
}

void dequantize_f32(const Group& w, int64_t cols, float* out) noexcept {
  dequantize_floats<4>(
      w, cols, out, [](I v, float* to) BEZEL_LAMBDA { store_float(to, bits(v)); },
      [](const uint8_t* p) BEZEL_LAMBDA {
        float value;
        std::memcpy(&value, p, 4);
        return value;
      });
}

void dequantize_f16(const Group& w, int64_t cols, float* out) noexcept {
  dequantize_floats<2>(
      w, cols, out,
      [](I v, float* to) BEZEL_LAMBDA {
        store_float(to, half(v));
        store_float(to + kRows, half(shr<16>(v)));
      },
      [](const uint8_t* p) BEZEL_LAMBDA {
        uint16_t h[kRows] = {};
        float value[kRows];
        std::memcpy(h, p, 2);
        store_float(value, halves(h));
        return value[0];
      });
}

void dequantize_bf16(const Group& w, int64_t cols, float* out) noexcept {
  dequantize_floats<2>(
      w, cols, out,
      [](I v, float* to) BEZEL_LAMBDA {
        store_float(to, bits(shl<16>(v)));
        store_float(to + kRows, bits(shl<16>(shr<16>(v))));
      },
      [](const uint8_t* p) BEZEL_LAMBDA {
        uint8_t word[4] = {0, 0, p[0], p[1]};
        float value;
        std::memcpy(&value, word, 4);
        return value;
      });
}

template <int kTokens>
void gemm_float_tile(const float* panel, int64_t cols, const float* x, float* acc) {
  F f[kTokens];
  repeat<kTokens>([&](auto t) BEZEL_LAMBDA { f[t.value] = load_float(acc + t.value * kRows); });
  for (int64_t k = 0; k < cols; ++k, panel += kRows, x += kTokens) {
    const F w = load_float(panel);
    repeat<kTokens>([&](auto t) BEZEL_LAMBDA { f[t.value] = fma(w, splat(x + t.value), f[t.value]); });
  }
  repeat<kTokens>([&](auto t) BEZEL_LAMBDA { store_float(acc + t.value * kRows, f[t.value]); });
}

void gemm_float(const float* panel, int64_t cols, const float* x, int tokens, float* acc) noexcept {
  with_tokens<kTileTokens>(tokens,
                           [&](auto t) BEZEL_LAMBDA { gemm_float_tile<decltype(t)::value>(panel, cols, x, acc); });
}

template <class W>
constexpr void add_format(LinearKernels& k) {
  constexpr int kBits =
      kNarrowSums ? W::kBits : 8;  // where the width makes no difference, formats share a kernel
  k.of[W::kType] = {W::kZero, gemv<W>, unpack<W>, gemm<kBits, W::kSub, W::kMinimum>};
  k.dequantize[W::kType] = dequantize<W>;
}

constexpr LinearKernels vector_table() {
  LinearKernels k{};
  k.rows = kRows;
  k.tokens = kTileTokens;
  k.quantize = quantize;
#define BEZEL_ADD(format, ...) add_format<format>(k);
  BEZEL_BLOCK_FORMATS(BEZEL_ADD)
#undef BEZEL_ADD
  k.dequantize[formats::F32::kType] = dequantize_f32;
  k.dequantize[formats::F16::kType] = dequantize_f16;
  k.dequantize[formats::BF16::kType] = dequantize_bf16;
  k.gemm_float = gemm_float;
  return k;
}

}  // namespace
}  // namespace bezel
