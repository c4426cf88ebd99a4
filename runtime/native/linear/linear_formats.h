// How the quantized formats lie in a file, over the primitives that linear_vector.h lists: each gives the
// codes of a unit of a group of rows, in any order of its sub-blocks, and the scales, collected before or set
// with the codes. Included by linear_vector.h.
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

// The 16 bytes at `p` in every row of the group.
struct Rows {
  I v[4];
};

BEZEL_INLINE Rows rows16(const uint8_t* p, int64_t row_bytes) {
  return {{load_rows(p, row_bytes), load_rows(p + row_bytes, row_bytes),
           load_rows(p + 2 * row_bytes, row_bytes), load_rows(p + 3 * row_bytes, row_bytes)}};
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
  const I a = lo32(r.v[0], r.v[1]), b = hi32(r.v[0], r.v[1]), c = lo32(r.v[2], r.v[3]),
          d = hi32(r.v[2], r.v[3]);
  return {{lo64(a, c), hi64(a, c), lo64(b, d), hi64(b, d)}};
}

BEZEL_INLINE I sum_of_words(const Rows& r) {
  const I a = add32(lo32(r.v[0], r.v[1]), hi32(r.v[0], r.v[1]));
  const I b = add32(lo32(r.v[2], r.v[3]), hi32(r.v[2], r.v[3]));
  return add32(lo64(a, b), hi64(a, b));
}

// While a unit is multiplied, a few rows of the next one with each sub-block: its lines are brought near from the
// second-level cache, because a unit begins with its scales, which everything else waits for.
struct LinesAhead {
  template <int kUnitBytes>
  BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, int64_t, int row, int end) {
    for (; row < end; ++row)
      for (int i = 0; i < kUnitBytes; i += 64) prefetch_near(w + row * row_bytes + i);
  }
};

// The float16 that the blocks of a unit begin with, of this unit and of the next one. They are collected through
// memory, where they compete with no vector operation, and long before they are wanted, since these loads cannot be
// forwarded from such small stores; a few rows with every block, because so many stores at once would hold up all else.
template <int kBytes>
struct HalvesAhead {
  alignas(64) uint16_t value[2][kUnit][kRows];
  int next = 0;

  template <int>
  BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, int64_t blocks, int row, int end) {
    for (w += row * row_bytes; row < end; ++row, w += row_bytes) {
      const auto copy = [&](int b) BEZEL_LAMBDA { std::memcpy(&value[next][b][row], w + b * kBytes, 2); };
      if (blocks >= kUnit) {
        repeat<kUnit>([&](auto b) BEZEL_LAMBDA { copy(b.value); });
      } else {
        for (int b = 0; b < blocks; ++b) copy(b);
      }
    }
  }
};

template <int kBytes>
struct HalfScales {
  using Ahead = HalvesAhead<kBytes>;
  const uint16_t (*value)[kRows];

  BEZEL_INLINE void collect(const uint8_t*, int64_t, Ahead& ahead) {
    value = ahead.value[ahead.next];
    ahead.next = 1 - ahead.next;
  }
  BEZEL_INLINE F d(int j) const { return halves(value[j]); }
};

// The same float16, and the minimum that may follow, from the first 16 bytes of a block in every row.
template <bool kMinimum>
struct HeadScales {
  using Ahead = LinesAhead;
  F scale[kUnit], minimum[kMinimum ? kUnit : 1];

  BEZEL_INLINE void collect(const uint8_t*, int64_t, LinesAhead&) {}
  BEZEL_INLINE void set(int b, const Rows& head) {
    const I first = lo64(lo32(head.v[0], head.v[1]), lo32(head.v[2], head.v[3]));
    scale[b] = half(first);
    if constexpr (kMinimum) minimum[b] = half(shr<16>(first));
  }
  BEZEL_INLINE F d(int j) const { return scale[j]; }
  BEZEL_INLINE F m(int j) const { return minimum[j]; }
};

struct Q4_0 : formats::Q4_0 {
  static constexpr int kBits = 4, kZero = 8;
  static constexpr bool kInOrder = true;
  using Scales = HalfScales<kBytes>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, Scales&, const Sink& sink) {
    for (int b = 0; b < blocks; ++b) {
      const Rows packed = rows16(w + b * kBytes + 2, row_bytes);
      sink(b, low_nibbles(packed), high_nibbles(packed));
    }
  }
};

struct Q4_1 : formats::Q4_1 {
  static constexpr int kBits = 4, kZero = 0;
  static constexpr bool kInOrder = true;
  using Scales = HeadScales<kMinimum>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, Scales& scales, const Sink& sink) {
    for (int b = 0; b < blocks; ++b) {
      const uint8_t* block = w + b * kBytes;
      scales.set(b, rows16(block, row_bytes));
      const Rows packed = rows16(block + 4, row_bytes);
      sink(b, low_nibbles(packed), high_nibbles(packed));
    }
  }
};

// Of Q5_0 or Q5_1: after kHead bytes of scales come 4 of fifth bits, then the nibbles.
template <int kHead, class Scales, class Sink>
BEZEL_INLINE void five_bit_codes(int b, const uint8_t* block, int64_t row_bytes, Scales& scales, const Sink& sink) {
  const Rows head = rows16(block, row_bytes), packed = rows16(block + kHead + 4, row_bytes);
  scales.set(b, head);
  sink(b, each(low_nibbles(packed), head, [](I q, I h) BEZEL_LAMBDA { return or_(q, fifth_bits<kHead>(h)); }),
       each(high_nibbles(packed), head, [](I q, I h) BEZEL_LAMBDA { return or_(q, fifth_bits<kHead + 2>(h)); }));
}

struct Q5_0 : formats::Q5_0 {
  static constexpr int kBits = 5, kZero = 16;
  static constexpr bool kInOrder = true;
  using Scales = HeadScales<kMinimum>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, Scales& scales, const Sink& sink) {
    for (int b = 0; b < blocks; ++b) five_bit_codes<2>(b, w + b * kBytes, row_bytes, scales, sink);
  }
};

struct Q5_1 : formats::Q5_1 {
  static constexpr int kBits = 5, kZero = 0;
  static constexpr bool kInOrder = true;
  using Scales = HeadScales<kMinimum>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, Scales& scales, const Sink& sink) {
    for (int b = 0; b < blocks; ++b) five_bit_codes<4>(b, w + b * kBytes, row_bytes, scales, sink);
  }
};

struct Q8_0 : formats::Q8_0 {
  static constexpr int kBits = 8, kZero = kSignedCodes ? 0 : 128;
  static constexpr bool kInOrder = true;
  using Scales = HalfScales<kBytes>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, Scales&, const Sink& sink) {
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

// Of Q2_K and Q3_K, whose codes are narrow enough for sums of 4 bits. Each half of a block keeps its 8 sub-blocks
// in 32 bytes, two bits of every other one in the same 16.
template <class Change, class Sink>
BEZEL_INLINE void two_bit_codes(const uint8_t* w, int64_t row_bytes, const Change& change, const Sink& sink) {
  repeat<2>([&](auto h) BEZEL_LAMBDA {
    repeat<2>([&](auto part) BEZEL_LAMBDA {
      const Rows packed = rows16(w + 32 * h.value + 16 * part.value, row_bytes);
      repeat<4>([&](auto pair) BEZEL_LAMBDA {
        constexpr int kShift = 2 * decltype(pair)::value;
        const Rows low = each(packed, [](I v) BEZEL_LAMBDA { return and_(shr<kShift>(v), bytes(3)); });
        sink(8 * h.value + kShift + part.value, change(low, part, Constant<4 * decltype(h)::value + kShift / 2>{}));
      });
    });
  });
}

struct Q2_K : formats::Q2_K {
  static constexpr int kBits = 4, kZero = 0;
  static constexpr bool kInOrder = false;

  // A block begins with a byte for each sub-block, and ends with d and dmin.
  struct Scales {
    using Ahead = LinesAhead;
    F scale[16], minimum[16];

    BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, LinesAhead&) {
      const I super = transposed(rows16(w + 68, row_bytes)).v[3];
      const F d = half(super), dmin = half(shr<16>(super));
      const Rows s = transposed(rows16(w, row_bytes));
      repeat<16>([&](auto j) BEZEL_LAMBDA {
        constexpr int kShift = decltype(j)::value % 4 * 8;
        const I both = s.v[j.value / 4];
        scale[j.value] = mul(d, to_float(and_(shr<kShift>(both), words(15))));
        minimum[j.value] = negative(mul(dmin, to_float(and_(shr<kShift + 4>(both), words(15)))));
      });
    }
    BEZEL_INLINE F d(int j) const { return scale[j]; }
    BEZEL_INLINE F m(int j) const { return minimum[j]; }
  };

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int, Scales&, const Sink& sink) {
    two_bit_codes(w + 16, row_bytes, [](const Rows& low, auto, auto) BEZEL_LAMBDA { return low; }, sink);
  }
};

struct Q3_K : formats::Q3_K {
  static constexpr int kBits = 4, kZero = 4;
  static constexpr bool kInOrder = false;

  // At the end of a block are 12 bytes of scales and d: the low four bits of scales j and j + 8 in byte j, the top two
  // of every fourth in byte 8 + j % 4.
  struct Scales {
    using Ahead = LinesAhead;
    F scale[16];

    BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, LinesAhead&) {
      const Rows tail = transposed(rows16(w + 94, row_bytes));  // the block's last 16 bytes
      const F super = half(shr<16>(tail.v[3]));
      const auto word = [&](int i) BEZEL_LAMBDA { return or_(shr<16>(tail.v[i]), shl<16>(tail.v[i + 1])); };
      const I low[2] = {word(0), word(1)}, top = word(2);
      repeat<4>([&](auto i) BEZEL_LAMBDA {
        constexpr int k = decltype(i)::value;
        const I nibbles = and_(shr<k / 2 * 4>(low[k % 2]), bytes(15));
        const I stored = or_(nibbles, shl<4>(and_(shr<2 * k>(top), bytes(3))));
        repeat<4>([&](auto j) BEZEL_LAMBDA {
          const I one = and_(shr<8 * decltype(j)::value>(stored), words(63));
          scale[4 * k + j.value] = mul(super, to_float(sub32(one, words(32))));
        });
      });
    }
    BEZEL_INLINE F d(int j) const { return scale[j]; }
    BEZEL_INLINE F m(int) const { return zero(); }
  };

  // The third bits of weights 32 i … 32 i + 31 are bit i of the first 32 bytes.
  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int, Scales&, const Sink& sink) {
    const Rows third[2] = {rows16(w, row_bytes), rows16(w + 16, row_bytes)};
    const auto join = [&](const Rows& low, auto part, auto i) BEZEL_LAMBDA {
      return each(low, third[part.value], [](I q, I t) BEZEL_LAMBDA {
        constexpr int kBit = decltype(i)::value;
        return or_(q, and_(kBit < 2 ? shl<kBit < 2 ? 2 - kBit : 0>(t) : shr<kBit < 2 ? 0 : kBit - 2>(t), bytes(4)));
      });
    };
    two_bit_codes(w + 32, row_bytes, join, sink);
  }
};

// The head of a Q4_K or Q5_K block is 16 bytes: d, dmin, eight scales and eight minima of six bits. The last
// four of each have their top two bits above the first four.
struct AffineKScales {
  using Ahead = LinesAhead;
  F scale[8], minimum[8];

  BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, LinesAhead&) {
    const Rows head = transposed(rows16(w, row_bytes));
    const F d = half(head.v[0]), dmin = half(shr<16>(head.v[0]));
    repeat<4>([&](auto j) BEZEL_LAMBDA {
      constexpr int kShift = 8 * decltype(j)::value;
      const I s = shr<kShift>(head.v[1]), m = shr<kShift>(head.v[2]), rest = shr<kShift>(head.v[3]);
      scale[kShift / 8] = mul(d, to_float(and_(s, words(63))));
      minimum[kShift / 8] = negative(mul(dmin, to_float(and_(m, words(63)))));
      scale[kShift / 8 + 4] = mul(d, to_float(or_(and_(rest, words(15)), and_(shr<2>(s), words(48)))));
      minimum[kShift / 8 + 4] =
          negative(mul(dmin, to_float(or_(and_(shr<4>(rest), words(15)), and_(shr<2>(m), words(48))))));
    });
  }
  BEZEL_INLINE F d(int j) const { return scale[j]; }
  BEZEL_INLINE F m(int j) const { return minimum[j]; }
};

struct Q4_K : formats::Q4_K {
  static constexpr int kBits = 4, kZero = 0;
  static constexpr bool kInOrder = true;
  using Scales = AffineKScales;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int, Scales&, const Sink& sink) {
    for (int c = 0; c < 4; ++c) {
      const Rows a = rows16(w + 16 + 32 * c, row_bytes), b = rows16(w + 32 + 32 * c, row_bytes);
      sink(2 * c, low_nibbles(a), low_nibbles(b));
      sink(2 * c + 1, high_nibbles(a), high_nibbles(b));
    }
  }
};

struct Q5_K : formats::Q5_K {
  static constexpr int kBits = 5, kZero = 0;
  static constexpr bool kInOrder = true;
  using Scales = AffineKScales;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int, Scales&, const Sink& sink) {
    Rows ha = rows16(w + 16, row_bytes), hb = rows16(w + 32, row_bytes);  // bit j for sub-block j
    const auto low = [](I q, I h)
                         BEZEL_LAMBDA { return or_(and_(q, bytes(15)), and_(shl<4>(h), bytes(16))); };
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

struct Q6_K : formats::Q6_K {
  static constexpr int kBits = 6, kZero = 32;
  static constexpr bool kInOrder = false;

  struct Scales {
    using Ahead = LinesAhead;
    F scale[16];

    BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, LinesAhead&) {
      const F super =
          half(shr<16>(transposed(rows16(w + 194, row_bytes)).v[3]));  // the block's last 16 bytes
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
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int, Scales&, const Sink& sink) {
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

constexpr int kIQ4Zero = kSignedCodes ? 0 : 128;

// Nibbles and what they stand for, in two vectors a row.
template <class Sink>
BEZEL_INLINE void iq4_codes(int j, const uint8_t* w, int64_t row_bytes, const Sink& sink) {
  const I values = xor_(splat16(kIQ4Values), bytes(kIQ4Zero));
  const auto value = [&](I nibbles) BEZEL_LAMBDA { return look_up(values, nibbles); };
  const Rows packed = rows16(w, row_bytes);
  sink(j, each(low_nibbles(packed), value), each(high_nibbles(packed), value));
}

struct IQ4_NL : formats::IQ4_NL {
  static constexpr int kBits = 8, kZero = kIQ4Zero;
  static constexpr bool kInOrder = true;
  using Scales = HalfScales<kBytes>;

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int blocks, Scales&, const Sink& sink) {
    for (int b = 0; b < blocks; ++b) iq4_codes(b, w + b * kBytes + 2, row_bytes, sink);
  }
};

struct IQ4_XS : formats::IQ4_XS {
  static constexpr int kBits = 8, kZero = kIQ4Zero;
  static constexpr bool kInOrder = true;

  // Before the codes lie d, the top two bits of the eight scales and the low four.
  struct Scales {
    using Ahead = LinesAhead;
    F scale[8];

    BEZEL_INLINE void collect(const uint8_t* w, int64_t row_bytes, LinesAhead&) {
      const Rows head = transposed(rows16(w, row_bytes));
      const F d = half(head.v[0]);
      const I top = shr<16>(head.v[0]);
      repeat<8>([&](auto i) BEZEL_LAMBDA {
        constexpr int j = decltype(i)::value;
        const I low = and_(shr<4 * j>(head.v[1]), words(15));
        const I high = shl<4>(and_(shr<2 * j>(top), words(3)));
        scale[j] = mul(d, to_float(sub32(or_(low, high), words(32))));
      });
    }
    BEZEL_INLINE F d(int j) const { return scale[j]; }
    BEZEL_INLINE F m(int) const { return zero(); }
  };

  template <class Sink>
  static BEZEL_INLINE void codes(const uint8_t* w, int64_t row_bytes, int, Scales&, const Sink& sink) {
    for (int j = 0; j < 8; ++j) iq4_codes(j, w + 8 + 16 * j, row_bytes, sink);
  }
};

}  // namespace
}  // namespace bezel
