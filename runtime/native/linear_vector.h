// The kernels of every vector instruction set, written once over primitives.
//
// An instruction set has vectors of kLanes lanes of 128 bits. A group is 4 · kLanes rows; row 4 l + i of it is at
// lane l of vector i. So 16 bytes of each row fill four vectors; transposing the 4 × 4 words of every lane makes
// vectors whose words are the rows, and so does the tree that adds up the four words of a lane. Scales are then
// applied with a row in each word, in the fixed order.
//
// Included by a file that has defined, in bezel's anonymous namespace: kLanes; the vectors I (integers) and F (float32);
// on I load store and_ or_ add32 sub32 shl<n> shr<n> sar<n> (32-bit words) bytes words lo32 hi32 lo64 hi64
// load_rows splat16; between them to_float half bits; on F zero mul add fma splat load_float store_float halves;
// prefetch; fifth_bits; kSignedCodes; kNarrowSums; kTileTokens; Sum<bits, steps>; quantize.
#pragma once

#include <cstring>

namespace bezel {
namespace {

constexpr int kRows = 4 * kLanes;
constexpr int kUnit = 8;  // blocks that are worked on together: the super-block of the K formats

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <int kCount, class Body>
BEZEL_INLINE void repeat(const Body& body) {
  if constexpr (kCount > 0) {
    repeat<kCount - 1>(body);
    body(Constant<kCount - 1>{});
  }
}

// ---- Formats. Each gives the codes of a unit, in any order of sub-blocks, and the scales.

// The 16 bytes at `p` in every row of the group.
struct Rows {
  I v[4];
};

BEZEL_INLINE Rows rows16(const uint8_t* p, int64_t row_bytes) {
  return {{load_rows(p, row_bytes), load_rows(p + row_bytes, row_bytes), load_rows(p + 2 * row_bytes, row_bytes),
           load_rows(p + 3 * row_bytes, row_bytes)}};
}

template <class Change>
BEZEL_INLINE Rows each(const Rows& rows, const Change& change) {
  return {{change(rows.v[0]), change(rows.v[1]), change(rows.v[2]), change(rows.v[3])}};
}

template <class Join>
BEZEL_INLINE Rows each(const Rows& a, const Rows& b, const Join& join) {
  return {{join(a.v[0], b.v[0]), join(a.v[1], b.v[1]), join(a.v[2], b.v[2]), join(a.v[3], b.v[3])}};
}

BEZEL_INLINE Rows low_nibbles(const Rows& rows) {
  return each(rows, [](I v) BEZEL_LAMBDA { return and_(v, bytes(15)); });
}

BEZEL_INLINE Rows high_nibbles(const Rows& rows) {
  return each(rows, [](I v) BEZEL_LAMBDA { return and_(shr<4>(v), bytes(15)); });
}

// Four words of each row → four vectors with a row in each word.
BEZEL_INLINE Rows transposed(const Rows& r) {
  const I a = lo32(r.v[0], r.v[1]), b = hi32(r.v[0], r.v[1]), c = lo32(r.v[2], r.v[3]), d = hi32(r.v[2], r.v[3]);
  return {{lo64(a, c), hi64(a, c), lo64(b, d), hi64(b, d)}};
}

BEZEL_INLINE I sum_of_words(const Rows& r) {
  const I a = add32(lo32(r.v[0], r.v[1]), hi32(r.v[0], r.v[1]));
  const I b = add32(lo32(r.v[2], r.v[3]), hi32(r.v[2], r.v[3]));
  return add32(lo64(a, b), hi64(a, b));
}

// A float16 field of the blocks of a unit. It is collected through memory, where it competes with no vector
// operation, and long before it is wanted, since these loads cannot be forwarded from such small stores.
struct Halves {
  alignas(64) uint16_t value[kUnit][kRows];

  BEZEL_INLINE void collect(const uint8_t* field, int64_t row_bytes, int block_bytes, int blocks) {
    for (int r = 0; r < kRows; ++r, field += row_bytes)
      for (int b = 0; b < blocks; ++b) std::memcpy(&value[b][r], field + b * block_bytes, 2);
  }
  BEZEL_INLINE F get(int b) const { return halves(value[b]); }
};

template <int kBytes, bool kMinimum>
struct BlockScales {
  Halves scale, minimum;

  BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, int blocks) {
    scale.collect(w, row_bytes, kBytes, blocks);
    if constexpr (kMinimum) minimum.collect(w + 2, row_bytes, kBytes, blocks);
  }
  BEZEL_INLINE F d(int j) const { return scale.get(j); }
  BEZEL_INLINE F m(int j) const { return minimum.get(j); }
};

struct Q4_0 {
  static constexpr int kType = kQ4_0, kBlock = 32, kBytes = 18, kSub = 32, kBits = 4, kZero = 8;
  static constexpr bool kMinimum = false;
  using Scales = BlockScales<kBytes, kMinimum>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, const Sink& sink) {
    for (int b = 0; b < blocks; ++b) {
      const Rows packed = rows16(w + b * kBytes + 2, row_bytes);
      sink(b, low_nibbles(packed), high_nibbles(packed));
    }
  }
};

struct Q4_1 {
  static constexpr int kType = kQ4_1, kBlock = 32, kBytes = 20, kSub = 32, kBits = 4, kZero = 0;
  static constexpr bool kMinimum = true;
  using Scales = BlockScales<kBytes, kMinimum>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, const Sink& sink) {
    for (int b = 0; b < blocks; ++b) {
      const Rows packed = rows16(w + b * kBytes + 4, row_bytes);
      sink(b, low_nibbles(packed), high_nibbles(packed));
    }
  }
};

struct Q5_0 {
  static constexpr int kType = kQ5_0, kBlock = 32, kBytes = 22, kSub = 32, kBits = 5, kZero = 16;
  static constexpr bool kMinimum = false;
  using Scales = BlockScales<kBytes, kMinimum>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, const Sink& sink) {
    for (int b = 0; b < blocks; ++b) {
      // 16 bytes whose words 1 … 3 are the first 12 of the codes and whose word 0 ends with half of the fifth
      // bits would be one load less, and no simpler.
      const uint8_t* block = w + b * kBytes;
      const Rows packed = rows16(block + 6, row_bytes), high = rows16(block + 2, row_bytes);
      sink(b, each(low_nibbles(packed), high, [](I q, I h) BEZEL_LAMBDA { return or_(q, fifth_bits<0>(h)); }),
           each(high_nibbles(packed), high, [](I q, I h) BEZEL_LAMBDA { return or_(q, fifth_bits<1>(h)); }));
    }
  }
};

struct Q8_0 {
  static constexpr int kType = kQ8_0, kBlock = 32, kBytes = 34, kSub = 32, kBits = 8;
  static constexpr int kZero = kSignedCodes ? 0 : 128;
  static constexpr bool kMinimum = false;
  using Scales = BlockScales<kBytes, kMinimum>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, const Sink& sink) {
    const auto offset = [](I v) BEZEL_LAMBDA {
      if constexpr (kZero == 0) return v;
      else return xor_(v, bytes(128));
    };
    for (int b = 0; b < blocks; ++b) {
      const uint8_t* block = w + b * kBytes;
      sink(b, each(rows16(block + 2, row_bytes), offset), each(rows16(block + 18, row_bytes), offset));
    }
  }
};

// The head of a Q4_K or Q5_K block is 16 bytes: d, dmin, eight scales and eight minima of six bits. The last four
// of each have their top two bits above the first four.
struct AffineKScales {
  F scale[8], minimum[8];

  BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, int) {
    const Rows head = transposed(rows16(w, row_bytes));
    const F d = half(head.v[0]), dmin = half(shr<16>(head.v[0]));
    repeat<4>([&](auto j) BEZEL_LAMBDA {
      constexpr int kShift = 8 * decltype(j)::value;
      const I s = shr<kShift>(head.v[1]), m = shr<kShift>(head.v[2]), rest = shr<kShift>(head.v[3]);
      scale[kShift / 8] = mul(d, to_float(and_(s, words(63))));
      minimum[kShift / 8] = negative(mul(dmin, to_float(and_(m, words(63)))));
      scale[kShift / 8 + 4] =
          mul(d, to_float(or_(and_(rest, words(15)), and_(shr<2>(s), words(48)))));
      minimum[kShift / 8 + 4] =
          negative(mul(dmin, to_float(or_(and_(shr<4>(rest), words(15)), and_(shr<2>(m), words(48))))));
    });
  }
  BEZEL_INLINE F d(int j) const { return scale[j]; }
  BEZEL_INLINE F m(int j) const { return minimum[j]; }
};

struct Q4_K {
  static constexpr int kType = kQ4_K, kBlock = 256, kBytes = 144, kSub = 32, kBits = 4, kZero = 0;
  static constexpr bool kMinimum = true;
  using Scales = AffineKScales;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int, const Sink& sink) {
    for (int c = 0; c < 4; ++c) {
      const Rows a = rows16(w + 16 + 32 * c, row_bytes), b = rows16(w + 32 + 32 * c, row_bytes);
      sink(2 * c, low_nibbles(a), low_nibbles(b));
      sink(2 * c + 1, high_nibbles(a), high_nibbles(b));
    }
  }
};

struct Q5_K {
  static constexpr int kType = kQ5_K, kBlock = 256, kBytes = 176, kSub = 32, kBits = 5, kZero = 0;
  static constexpr bool kMinimum = true;
  using Scales = AffineKScales;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int, const Sink& sink) {
    Rows ha = rows16(w + 16, row_bytes), hb = rows16(w + 32, row_bytes);  // bit j for sub-block j
    const auto low = [](I q, I h) BEZEL_LAMBDA { return or_(and_(q, bytes(15)), and_(shl<4>(h), bytes(16))); };
    const auto high = [](I q, I h) BEZEL_LAMBDA {
      return or_(and_(shr<4>(q), bytes(15)), and_(shl<3>(h), bytes(16)));
    };
    const auto next = [](I h) BEZEL_LAMBDA { return shr<2>(h); };
    for (int c = 0; c < 4; ++c, ha = each(ha, next), hb = each(hb, next)) {
      const Rows a = rows16(w + 48 + 32 * c, row_bytes), b = rows16(w + 64 + 32 * c, row_bytes);
      sink(2 * c, each(a, ha, low), each(b, hb, low));
      sink(2 * c + 1, each(a, ha, high), each(b, hb, high));
    }
  }
};

struct Q6_K {
  static constexpr int kType = kQ6_K, kBlock = 256, kBytes = 210, kSub = 16, kBits = 6, kZero = 32;
  static constexpr bool kMinimum = false;

  struct Scales {
    F scale[16];

    BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, int) {
      const F super = half(shr<16>(transposed(rows16(w + 194, row_bytes)).v[3]));  // the block's last 16 bytes
      const Rows s = transposed(rows16(w + 192, row_bytes));
      repeat<4>([&](auto i) BEZEL_LAMBDA {
        constexpr int k = 4 * decltype(i)::value;
        const I v = s.v[k / 4];
        scale[k] = mul(super, to_float(sar<24>(shl<24>(v))));
        scale[k + 1] = mul(super, to_float(sar<24>(shl<16>(v))));
        scale[k + 2] = mul(super, to_float(sar<24>(shl<8>(v))));
        scale[k + 3] = mul(super, to_float(sar<24>(v)));
      });
    }
    BEZEL_INLINE F d(int j) const { return scale[j]; }
    BEZEL_INLINE F m(int) const { return zero(); }
  };

  // Each half of a block keeps the low four bits of its 8 sub-blocks in 64 bytes, the high two bits in 32.
  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int, const Sink& sink) {
    for (int h = 0; h < 2; ++h)
      for (int part = 0; part < 2; ++part) {
        const uint8_t* low = w + 64 * h + 16 * part;
        const Rows a = rows16(low, row_bytes), b = rows16(low + 32, row_bytes);
        const Rows high = rows16(w + 128 + 32 * h + 16 * part, row_bytes);
        const int j = 8 * h + part;
        sink(j, each(a, high, [](I q, I t) BEZEL_LAMBDA {
               return or_(and_(q, bytes(15)), and_(shl<4>(t), bytes(48)));
             }));
        sink(j + 2, each(b, high, [](I q, I t) BEZEL_LAMBDA {
               return or_(and_(q, bytes(15)), and_(shl<2>(t), bytes(48)));
             }));
        sink(j + 4, each(a, high, [](I q, I t) BEZEL_LAMBDA {
               return or_(and_(shr<4>(q), bytes(15)), and_(t, bytes(48)));
             }));
        sink(j + 6, each(b, high, [](I q, I t) BEZEL_LAMBDA {
               return or_(and_(shr<4>(q), bytes(15)), and_(shr<2>(t), bytes(48)));
             }));
      }
  }
};

// ---- Kernels.

// Fetches the unit of the group ahead, a share with every sub-block.
template <class W>
struct Ahead {
  static constexpr int kUnitBytes = kUnit * 32 / W::kBlock * W::kBytes, kShares = kUnit * 32 / W::kSub;
#ifdef LINEAR
  static constexpr int kShare = (kRows * kUnitBytes / 64 + kShares - 1) / kShares * 64;
  const uint8_t* p; int64_t rb;

  BEZEL_INLINE void fetch(int) {
    for (int i = 0; i < kShare; i += 64) prefetch(p + i);
    p += kRows * kUnitBytes / kShares;
  }
  BEZEL_INLINE void next() {}
#else
  const uint8_t* p;
  int64_t row_bytes;

  BEZEL_INLINE void fetch(int share) const {
    for (int r = share * kRows / kShares; r < (share + 1) * kRows / kShares; ++r)
      for (int i = 0; i < kUnitBytes; i += 64) prefetch(p + r * row_bytes + i);
  }
  BEZEL_INLINE void next() { p += kUnitBytes; }
#endif
};

template <class W>
void gemv(const Group& w, int64_t blocks, const Tile& x, float* y) noexcept {
  constexpr int kSubs = 32 / W::kSub;  // of a block
  F acc = zero();
  const uint8_t* data = w.data;
  const int8_t* q = x.q;
  const float* dx = x.d;
  const int32_t* bias = static_cast<const int32_t*>(x.bias);
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
    W::codes(data, w.row_bytes, count, sink);
    for (int j = 0; j < count * kSubs; ++j) {
      const F scale = mul(scales.d(j), splat(dx + j / kSubs));
      if constexpr (W::kMinimum) {
        acc = fma(to_float(dot[j]), scale, acc);
        acc = fma(scales.m(j), splat(static_cast<const float*>(x.bias) + (q - x.q) / 32 + j), acc);
      } else {
        acc = fma(to_float(add32(dot[j], splat_word(bias + j))), scale, acc);
      }
    }
    data += Ahead<W>::kUnitBytes;
    ahead.next();
    q += kUnit * 32;
    dx += kUnit;
    bias += kUnit * kSubs;
  }
  store_float(y, acc);
}

// panel.codes: [column / 4][row][4]. Scales and minima: [sub-block][row].
template <class W>
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
        const Rows t = transposed(rows);
        repeat<4>([&](auto i) BEZEL_LAMBDA { store(to + decltype(i)::value * 4 * kRows, t.v[decltype(i)::value]); });
        to += 16 * kRows;
      };
      (put(codes), ...);
    };
    W::codes(data, w.row_bytes, count, sink);
    for (int j = 0; j < count * kSubs; ++j) {
      store_float(d + j * kRows, scales.d(j));
      if constexpr (W::kMinimum) store_float(m + j * kRows, scales.m(j));
    }
    data += Ahead<W>::kUnitBytes;
    ahead.next();
    out += kUnit * 32 * kRows;
    d += kUnit * kSubs * kRows;
    m += kUnit * kRows;
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
        repeat<kTokens>([&](auto t) BEZEL_LAMBDA { f[t.value] = fma(m, splat(moments + t.value), f[t.value]); });
      }
      codes += kSub * kRows;
      scales += kRows;
      bias += kTokens;
    });
    minima += kRows;
    moments += kTokens;
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
BEZEL_INLINE void dequantize_floats(const Group& w, int64_t cols, float* out, const Expand& expand, const One& one) {
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
void add_format(LinearKernels& k) noexcept {
  constexpr int kBits = kNarrowSums ? W::kBits : 8;  // where the width makes no difference, formats share a kernel
  k.of[W::kType] = {W::kZero, gemv<W>, unpack<W>, gemm<kBits, W::kSub, W::kMinimum>};
  k.dequantize[W::kType] = dequantize<W>;
}

void fill(LinearKernels& k) noexcept {
  k.rows = kRows;
  k.tokens = kTileTokens;
  k.quantize = quantize;
  add_format<Q4_0>(k);
  add_format<Q4_1>(k);
  add_format<Q5_0>(k);
  add_format<Q8_0>(k);
  add_format<Q4_K>(k);
  add_format<Q5_K>(k);
  add_format<Q6_K>(k);
  k.dequantize[kF32] = dequantize_f32;
  k.dequantize[kF16] = dequantize_f16;
  k.dequantize[kBF16] = dequantize_bf16;
  k.gemm_float = gemm_float;
}

}  // namespace
}  // namespace bezel
