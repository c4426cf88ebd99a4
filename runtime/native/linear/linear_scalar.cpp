// The reference that every other instruction set is tested against: written for reading, a row at a time.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "linear/linear_kernels.h"

namespace bezel {
namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t word16(const uint8_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 8; }

// float16 to float32. Subnormals come from an integer: small weights have them as scales, and a thread that
// flushes float32 subnormals to zero must get them too.
float half(const uint8_t* bytes) {
  const uint32_t half = word16(bytes);
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  const bool negative = half >> 15;
  float value = static_cast<float>(mantissa) * 0x1p-24f;
  if (exponent == 31) value = from_bits(0x7F800000u | mantissa << 13);
  else if (exponent != 0) value = from_bits((exponent + 112) << 23 | mantissa << 13);
  return negative ? -value : value;
}

int low(int byte) { return byte & 15; }
int high(int byte) { return byte >> 4; }

struct SubBlock {  // w[i] = d · code[i] + m
  int8_t code[32];
  float d, m = 0.0f;
};

// The nibbles of 16 bytes, the low ones first, less `zero`.
void nibbles(const uint8_t* bytes, int zero, int8_t* code) {
  for (int i = 0; i < 16; ++i) {
    code[i] = static_cast<int8_t>(low(bytes[i]) - zero);
    code[16 + i] = static_cast<int8_t>(high(bytes[i]) - zero);
  }
}

// Of 4 bytes of fifth bits, and 16 of nibbles.
void five_bits(const uint8_t* bytes, int zero, int8_t* code) {
  nibbles(bytes + 4, zero, code);
  for (int i = 0; i < 32; ++i) code[i] = static_cast<int8_t>(code[i] + 16 * (bytes[i / 8] >> i % 8 & 1));
}

void iq4_values(const uint8_t* bytes, int8_t* code) {
  nibbles(bytes, 0, code);
  for (int i = 0; i < 32; ++i) code[i] = kIQ4Values[code[i]];
}

// Scale or minimum j of the 12 bytes of a K format; `at` is where its first four begin.
int six_bits(const uint8_t* packed, int j, int at) {
  if (j < 4) return packed[at + j] & 63;
  const int rest = packed[8 + j - 4];
  return (at == 0 ? low(rest) : high(rest)) | packed[at + j - 4] >> 6 << 4;
}

// Sub-block `sub` of a block of Q4_K or Q5_K, whose nibbles begin at `codes`.
void affine_k(const uint8_t* block, int sub, const uint8_t* codes, SubBlock& out) {
  out.d = half(block) * static_cast<float>(six_bits(block + 4, sub, 0));
  out.m = -(half(block + 2) * static_cast<float>(six_bits(block + 4, sub, 4)));
  for (int i = 0; i < 32; ++i) {
    const int byte = codes[sub / 2 * 32 + i];
    out.code[i] = static_cast<int8_t>(sub % 2 == 0 ? low(byte) : high(byte));
  }
}

// For each format of the table: sub-block j of a row.

struct Q4_0 : formats::Q4_0 {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j * kBytes;
    out.d = half(block);
    nibbles(block + 2, 8, out.code);
  }
};

struct Q4_1 : formats::Q4_1 {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j * kBytes;
    out.d = half(block);
    out.m = half(block + 2);
    nibbles(block + 4, 0, out.code);
  }
};

struct Q5_0 : formats::Q5_0 {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j * kBytes;
    out.d = half(block);
    five_bits(block + 2, 16, out.code);
  }
};

struct Q5_1 : formats::Q5_1 {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j * kBytes;
    out.d = half(block);
    out.m = half(block + 2);
    five_bits(block + 4, 0, out.code);
  }
};

struct Q8_0 : formats::Q8_0 {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j * kBytes;
    out.d = half(block);
    std::memcpy(out.code, block + 2, 32);
  }
};

// Two bits of weight i of sub-block `sub` of a block of Q2_K or Q3_K.
int two_bits(const uint8_t* bytes, int sub, int i) {
  return bytes[sub / 8 * 32 + sub % 2 * 16 + i] >> sub % 8 / 2 * 2 & 3;
}

struct Q2_K : formats::Q2_K {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j / 16 * kBytes;
    const int sub = static_cast<int>(j % 16);
    out.d = half(block + 80) * static_cast<float>(low(block[sub]));
    out.m = -(half(block + 82) * static_cast<float>(high(block[sub])));
    for (int i = 0; i < 16; ++i) out.code[i] = static_cast<int8_t>(two_bits(block + 16, sub, i));
  }
};

struct Q3_K : formats::Q3_K {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j / 16 * kBytes;
    const uint8_t* scales = block + 96;
    const int sub = static_cast<int>(j % 16), pair = scales[sub % 8];
    const int top = scales[8 + sub % 4] >> sub / 4 * 2 & 3;
    out.d = half(block + 108) * static_cast<float>((sub < 8 ? low(pair) : high(pair)) + 16 * top - 32);
    for (int i = 0; i < 16; ++i) {
      const int third = block[sub % 2 * 16 + i] >> sub / 2 & 1;
      out.code[i] = static_cast<int8_t>(two_bits(block + 32, sub, i) + 4 * third - 4);
    }
  }
};

struct Q4_K : formats::Q4_K {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j / 8 * kBytes;
    affine_k(block, static_cast<int>(j % 8), block + 16, out);
  }
};

struct Q5_K : formats::Q5_K {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j / 8 * kBytes;
    const int sub = static_cast<int>(j % 8);
    affine_k(block, sub, block + 48, out);
    for (int i = 0; i < 32; ++i)
      out.code[i] = static_cast<int8_t>(out.code[i] + 16 * (block[16 + i] >> sub & 1));
  }
};

struct Q6_K : formats::Q6_K {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j / 16 * kBytes;
    const int sub = static_cast<int>(j % 16), h = sub / 8, g = sub % 8 / 2;
    out.d = half(block + 208) * static_cast<float>(static_cast<int8_t>(block[192 + sub]));
    for (int i = 0; i < 16; ++i) {
      const int at = sub % 2 * 16 + i, byte = block[64 * h + g % 2 * 32 + at];
      const int top = block[128 + 32 * h + at] >> 2 * g & 3;
      out.code[i] = static_cast<int8_t>((g < 2 ? low(byte) : high(byte)) + 16 * top - 32);
    }
  }
};

struct IQ4_NL : formats::IQ4_NL {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j * kBytes;
    out.d = half(block);
    iq4_values(block + 2, out.code);
  }
};

struct IQ4_XS : formats::IQ4_XS {
  static void read(const uint8_t* row, int64_t j, SubBlock& out) {
    const uint8_t* block = row + j / 8 * kBytes;
    const int sub = static_cast<int>(j % 8), pair = block[4 + sub / 2];
    const int top = static_cast<int>(word16(block + 2) >> 2 * sub & 3);
    out.d = half(block) * static_cast<float>((sub % 2 == 0 ? low(pair) : high(pair)) + 16 * top - 32);
    iq4_values(block + 8 + 16 * sub, out.code);
  }
};

template <class W>
float continued(float acc, const SubBlock& w, const int8_t* q, float dx, const float* moment) {
  int32_t dot = 0;
  for (int i = 0; i < W::kSub; ++i) dot += w.code[i] * q[i];
  acc = std::fma(static_cast<float>(dot), w.d * dx, acc);
  return W::kMinimum ? std::fma(w.m, *moment, acc) : acc;
}

template <class W>
void gemv(const Group& w, int64_t blocks, const Tile& x, int tokens, float* y) noexcept {
  constexpr int kSub = W::kSub;
  const float* moments = static_cast<const float*>(x.bias);
  for (int t = 0; t < tokens; ++t) y[t] = 0.0f;
  for (int64_t j = 0; j < blocks * 32 / kSub; ++j) {
    SubBlock s;
    W::read(w.data, j, s);
    const int64_t b = j * kSub / 32;
    for (int t = 0; t < tokens; ++t)
      y[t] = continued<W>(y[t], s, x.q + (b * tokens + t) * 32 + j * kSub % 32, x.d[b * tokens + t],
                          moments + j * tokens + t);
  }
}

template <class W>
void unpack(const Group& w, int64_t blocks, Panel& panel) noexcept {
  constexpr int kSub = W::kSub;
  for (int64_t j = 0; j < blocks * 32 / kSub; ++j) {
    SubBlock s;
    W::read(w.data, j, s);
    std::memcpy(panel.codes + j * kSub, s.code, kSub);
    panel.scales[j] = s.d;
    if (W::kMinimum) panel.minima[j] = s.m;
  }
}

template <class W>
void gemm(const Panel& panel, int64_t blocks, const Tile& x, int tokens, float* acc) noexcept {
  constexpr int kSub = W::kSub;
  const float* moments = static_cast<const float*>(x.bias);
  for (int64_t j = 0; j < blocks * 32 / kSub; ++j) {
    SubBlock s;
    std::memcpy(s.code, panel.codes + j * kSub, kSub);
    s.d = panel.scales[j];
    s.m = W::kMinimum ? panel.minima[j] : 0.0f;
    const int64_t b = j * kSub / 32;
    for (int t = 0; t < tokens; ++t)
      acc[t] = continued<W>(acc[t], s, x.q + (b * tokens + t) * 32 + j * kSub % 32, x.d[b * tokens + t],
                            moments + j * tokens + t);
  }
}

template <class W>
void dequantize(const Group& w, int64_t cols, float* out) noexcept {
  constexpr int kSub = W::kSub;
  for (int64_t j = 0; j < cols / kSub; ++j) {
    SubBlock s;
    W::read(w.data, j, s);
    for (int i = 0; i < kSub; ++i) {
      out[j * kSub + i] = static_cast<float>(s.code[i]) * s.d;
      if (W::kMinimum) out[j * kSub + i] += s.m;
    }
  }
}

void dequantize_f32(const Group& w, int64_t cols, float* out) noexcept {
  std::memcpy(out, w.data, static_cast<size_t>(cols) * 4);
}

void dequantize_f16(const Group& w, int64_t cols, float* out) noexcept {
  for (int64_t i = 0; i < cols; ++i) out[i] = half(w.data + 2 * i);
}

void dequantize_bf16(const Group& w, int64_t cols, float* out) noexcept {
  for (int64_t i = 0; i < cols; ++i) out[i] = from_bits(word16(w.data + 2 * i) << 16);
}

void gemm_float(const float* panel, int64_t cols, const float* x, int tokens, float* acc) noexcept {
  for (int64_t k = 0; k < cols; ++k)
    for (int t = 0; t < tokens; ++t) acc[t] = std::fma(panel[k], x[k * tokens + t], acc[t]);
}

void quantize(const float* x, int64_t blocks, int tokens, int8_t* q, float* d, int32_t* sums) noexcept {
  for (int64_t b = 0; b < blocks; ++b, x += 32, q += 32 * tokens, d += tokens, sums += 2 * tokens) {
    uint32_t max_bits = 0;  // as integers, magnitudes keep their order, and infinity and NaN come out on top
    for (int i = 0; i < 32; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      bits &= 0x7FFFFFFFu;
      if (bits > max_bits) max_bits = bits;
    }
    const bool finite = max_bits < 0x7F800000u;
    const float scale = from_bits(max_bits) / 127.0f;
    const bool usable = finite && scale >= FLT_MIN;
    *d = usable ? scale : finite ? 0.0f : NAN;
    const float inverse = usable ? 1.0f / scale : 0.0f;
    for (int h = 0; h < 2; ++h) {
      int32_t& sum = sums[h * tokens] = 0;
      for (int i = 16 * h; i < 16 * h + 16; ++i) {
        q[i] = static_cast<int8_t>(usable ? lrintf(x[i] * inverse) : 0);
        sum += q[i];
      }
    }
  }
}

template <class W>
constexpr void add_format(LinearKernels& k) {
  k.of[W::kType] = {0, gemv<W>, unpack<W>, gemm<W>};
  k.dequantize[W::kType] = dequantize<W>;
}

constexpr LinearKernels scalar_table() {
  LinearKernels k{};
  k.rows = 1;
  k.tokens = 4;
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

const LinearKernels& linear_scalar() noexcept {
  static constexpr LinearKernels kernels = scalar_table();
  return kernels;
}

void dequantize_row(int type, const uint8_t* row, int64_t cols, float* out) noexcept {
  linear_scalar().dequantize[type]({row, 0, row}, cols, out);
}

}  // namespace bezel
