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
// store_float halves; prefetch; fifth_bits look_up; kSignedCodes; kNarrowSums; kTileTokens; Sum<bits, steps>;
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

template <class W>
void gemv(const Group& w, int64_t blocks, const Tile& x, float* y) noexcept {
  constexpr int kSubs = 32 / W::kSub;  // of a block
  F acc = zero();
  const uint8_t* data = w.data;
  const int8_t* q = x.q;
  const float* dx = x.d;
  const int32_t* bias = static_cast<const int32_t*>(x.bias);
  const float* moments = static_cast<const float*>(x.bias);
  Ahead<W> ahead{w.ahead, w.row_bytes};
  for (int64_t left = blocks; left > 0; left -= kUnit) {
    const int count = left < kUnit ? static_cast<int>(left) : kUnit;
    typename W::Scales scales;
    scales.collect(data, w.row_bytes, count);
    I dot[kUnit * kSubs];
    const auto sink = [&](int j, const auto&... codes) BEZEL_LAMBDA {
      ahead.fetch(j);
      const int8_t* const xs = q + j * W::kSub;
      Rows lanes;
      repeat<4>([&](auto i) BEZEL_LAMBDA {
        Sum<W::kBits, W::kSub / 16> sum;
        sum.start();
        int at = 0;
        ((sum.add(at, codes.v[decltype(i)::value], splat16(xs + 16 * at)), ++at), ...);
        lanes.v[decltype(i)::value] = sum.total();
      });
      dot[j] = sum_of_words(lanes);
    };
    ahead.fetch_rest(count);
    W::codes(data, w.row_bytes, count, scales, sink);
    for (int j = 0; j < count * kSubs; ++j) {
      const F scale = mul(scales.d(j), splat(dx + j / kSubs));
      if constexpr (W::kMinimum) {
        acc = fma(to_float(dot[j]), scale, acc);
        acc = fma(scales.m(j), splat(moments + j), acc);
      } else {
        acc = fma(to_float(add32(dot[j], splat_word(bias + j))), scale, acc);
      }
    }
    data += Ahead<W>::kUnitBytes;
    ahead.next();
    q += kUnit * 32;
    dx += kUnit;
    bias += kUnit * kSubs;
    moments += kUnit * kSubs;
  }
  store_float(y, acc);
}

// panel.codes: [column / 4][row][4], unless 16 columns are arranged in another way. Scales and minima:
// [sub-block][row].
template <class W, Rows (*kArranged)(const Rows&) = transposed>
void unpack(const Group& w, int64_t blocks, Panel& panel) noexcept {
  constexpr int kSubs = 32 / W::kSub;
  const uint8_t* data = w.data;
  uint8_t* out = panel.codes;
  float* d = panel.scales;
  float* m = panel.minima;
  Ahead<W> ahead{w.ahead, w.row_bytes};
  for (int64_t left = blocks; left > 0; left -= kUnit) {
    const int count = left < kUnit ? static_cast<int>(left) : kUnit;
    typename W::Scales scales;
    scales.collect(data, w.row_bytes, count);
    const auto sink = [&](int j, const auto&... codes) BEZEL_LAMBDA {
      ahead.fetch(j);
      uint8_t* to = out + j * W::kSub * kRows;
      const auto put = [&](const Rows& rows) BEZEL_LAMBDA {
        const Rows t = kArranged(rows);
        repeat<4>([&](auto i)
                      BEZEL_LAMBDA { store(to + decltype(i)::value * 4 * kRows, t.v[decltype(i)::value]); });
        to += 16 * kRows;
      };
      (put(codes), ...);
    };
    ahead.fetch_rest(count);
    W::codes(data, w.row_bytes, count, scales, sink);
    for (int j = 0; j < count * kSubs; ++j) {
      store_float(d + j * kRows, scales.d(j));
      if constexpr (W::kMinimum) store_float(m + j * kRows, scales.m(j));
    }
    data += Ahead<W>::kUnitBytes;
    ahead.next();
    out += kUnit * 32 * kRows;
    d += kUnit * kSubs * kRows;
    m += kUnit * kSubs * kRows;
  }
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
  switch (tokens) {
    case 1: return gemm_tile<kBits, kSub, kMinimum, 1>(panel, blocks, x, acc);
    case 2: return gemm_tile<kBits, kSub, kMinimum, 2>(panel, blocks, x, acc);
    case 3: return gemm_tile<kBits, kSub, kMinimum, 3>(panel, blocks, x, acc);
    case 4: return gemm_tile<kBits, kSub, kMinimum, 4>(panel, blocks, x, acc);
    case 8:
      if constexpr (kTileTokens >= 8) return gemm_tile<kBits, kSub, kMinimum, 8>(panel, blocks, x, acc);
      break;
    case 12:
      if constexpr (kTileTokens >= 12) return gemm_tile<kBits, kSub, kMinimum, 12>(panel, blocks, x, acc);
      break;
    case 16:
      if constexpr (kTileTokens >= 16) return gemm_tile<kBits, kSub, kMinimum, 16>(panel, blocks, x, acc);
      break;
  }
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
  switch (tokens) {
    case 1: return gemm_float_tile<1>(panel, cols, x, acc);
    case 2: return gemm_float_tile<2>(panel, cols, x, acc);
    case 3: return gemm_float_tile<3>(panel, cols, x, acc);
    case 4: return gemm_float_tile<4>(panel, cols, x, acc);
    case 8:
      if constexpr (kTileTokens >= 8) return gemm_float_tile<8>(panel, cols, x, acc);
      break;
    case 12:
      if constexpr (kTileTokens >= 12) return gemm_float_tile<12>(panel, cols, x, acc);
      break;
    case 16:
      if constexpr (kTileTokens >= 16) return gemm_float_tile<16>(panel, cols, x, acc);
      break;
  }
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
