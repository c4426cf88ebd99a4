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

// Sub-block j of a row: w[i] = d · code[i] + m.
struct SubBlock {
  int8_t code[32];
  float d, m;
};

// Scale or minimum j of the 12 bytes of a K format; `at` is where its first four begin.
int six_bits(const uint8_t* packed, int j, int at) {
  if (j < 4) return packed[at + j] & 63;
  const int rest = packed[8 + j - 4];
  return (at == 0 ? low(rest) : high(rest)) | packed[at + j - 4] >> 6 << 4;
}

template <int kType>
void read(const uint8_t* row, int64_t j, SubBlock& out) {
  out.m = 0.0f;
  if constexpr (kType == kQ4_0 || kType == kQ4_1) {
    constexpr int kHead = kType == kQ4_0 ? 2 : 4;
    const uint8_t* block = row + j * (kHead + 16);
    out.d = half(block);
    if (kType == kQ4_1) out.m = half(block + 2);
    for (int i = 0; i < 16; ++i) {
      out.code[i] = static_cast<int8_t>(low(block[kHead + i]) - (kType == kQ4_0 ? 8 : 0));
      out.code[16 + i] = static_cast<int8_t>(high(block[kHead + i]) - (kType == kQ4_0 ? 8 : 0));
    }
  } else if constexpr (kType == kQ5_0 || kType == kQ5_1) {
    constexpr int kHead = kType == kQ5_0 ? 2 : 4;
    const uint8_t* block = row + j * (kHead + 20);
    out.d = half(block);
    if (kType == kQ5_1) out.m = half(block + 2);
    for (int i = 0; i < 32; ++i) {
      const int fifth = block[kHead + i / 8] >> i % 8 & 1, byte = block[kHead + 4 + i % 16];
      out.code[i] = static_cast<int8_t>((i < 16 ? low(byte) : high(byte)) + 16 * fifth - (kType == kQ5_0 ? 16 : 0));
    }
  } else if constexpr (kType == kQ8_0) {
    const uint8_t* block = row + j * 34;
    out.d = half(block);
    std::memcpy(out.code, block + 2, 32);
  } else if constexpr (kType == kQ4_K || kType == kQ5_K) {
    constexpr int kHigh = kType == kQ4_K ? 0 : 32;
    const uint8_t* block = row + j / 8 * (144 + kHigh);
    const int sub = static_cast<int>(j % 8);
    out.d = half(block) * static_cast<float>(six_bits(block + 4, sub, 0));
    out.m = -(half(block + 2) * static_cast<float>(six_bits(block + 4, sub, 4)));
    for (int i = 0; i < 32; ++i) {
      const int byte = block[16 + kHigh + sub / 2 * 32 + i];
      const int fifth = kHigh == 0 ? 0 : block[16 + i] >> sub & 1;
      out.code[i] = static_cast<int8_t>((sub % 2 == 0 ? low(byte) : high(byte)) + 16 * fifth);
    }
  } else if constexpr (kType == kQ6_K) {
    const uint8_t* block = row + j / 16 * 210;
    const int sub = static_cast<int>(j % 16), h = sub / 8, g = sub % 8 / 2;
    out.d = half(block + 208) * static_cast<float>(static_cast<int8_t>(block[192 + sub]));
    for (int i = 0; i < 16; ++i) {
      const int at = sub % 2 * 16 + i, byte = block[64 * h + g % 2 * 32 + at];
      const int top = block[128 + 32 * h + at] >> 2 * g & 3;
      out.code[i] = static_cast<int8_t>((g < 2 ? low(byte) : high(byte)) + 16 * top - 32);
    }
  } else if constexpr (kType == kIQ4_NL || kType == kIQ4_XS) {
    const uint8_t* block = kType == kIQ4_NL ? row + j * 18 : row + j / 8 * 136;
    const int sub = kType == kIQ4_NL ? 0 : static_cast<int>(j % 8);
    const uint8_t* codes = block + (kType == kIQ4_NL ? 2 : 8 + 16 * sub);
    out.d = half(block);
    if (kType == kIQ4_XS) {
      const int pair = block[4 + sub / 2], top = static_cast<int>(word16(block + 2) >> 2 * sub & 3);
      out.d *= static_cast<float>((sub % 2 == 0 ? low(pair) : high(pair)) + 16 * top - 32);
    }
    for (int i = 0; i < 16; ++i) {
      out.code[i] = kIQ4Values[low(codes[i])];
      out.code[16 + i] = kIQ4Values[high(codes[i])];
    }
  }
}

constexpr int sub_size(int type) { return type == kQ6_K ? 16 : 32; }
constexpr bool has_minimum(int type) { return type == kQ4_1 || type == kQ5_1 || type == kQ4_K || type == kQ5_K; }

template <int kType>
float continued(float acc, const SubBlock& w, const int8_t* q, float dx, const float* moment) {
  int32_t dot = 0;
  for (int i = 0; i < sub_size(kType); ++i) dot += w.code[i] * q[i];
  acc = std::fma(static_cast<float>(dot), w.d * dx, acc);
  return has_minimum(kType) ? std::fma(w.m, *moment, acc) : acc;
}

template <int kType>
void gemv(const Group& w, int64_t blocks, const Tile& x, float* y) noexcept {
  constexpr int kSub = sub_size(kType);
  const float* moments = static_cast<const float*>(x.bias);
  float acc = 0.0f;
  for (int64_t j = 0; j < blocks * 32 / kSub; ++j) {
    SubBlock s;
    read<kType>(w.data, j, s);
    acc = continued<kType>(acc, s, x.q + j * kSub, x.d[j * kSub / 32], moments + j);
  }
  *y = acc;
}

template <int kType>
void unpack(const Group& w, int64_t blocks, Panel& panel) noexcept {
  constexpr int kSub = sub_size(kType);
  for (int64_t j = 0; j < blocks * 32 / kSub; ++j) {
    SubBlock s;
    read<kType>(w.data, j, s);
    std::memcpy(panel.codes + j * kSub, s.code, kSub);
    panel.scales[j] = s.d;
    if (has_minimum(kType)) panel.minima[j] = s.m;
  }
}

template <int kType>
void gemm(const Panel& panel, int64_t blocks, const Tile& x, int tokens, float* acc) noexcept {
  constexpr int kSub = sub_size(kType);
  const float* moments = static_cast<const float*>(x.bias);
  for (int64_t j = 0; j < blocks * 32 / kSub; ++j) {
    SubBlock s;
    std::memcpy(s.code, panel.codes + j * kSub, kSub);
    s.d = panel.scales[j];
    s.m = has_minimum(kType) ? panel.minima[j] : 0.0f;
    const int64_t b = j * kSub / 32;
    for (int t = 0; t < tokens; ++t)
      acc[t] = continued<kType>(acc[t], s, x.q + (b * tokens + t) * 32 + j * kSub % 32, x.d[b * tokens + t],
                                moments + j * tokens + t);
  }
}

template <int kType>
void dequantize(const Group& w, int64_t cols, float* out) noexcept {
  constexpr int kSub = sub_size(kType);
  for (int64_t j = 0; j < cols / kSub; ++j) {
    SubBlock s;
    read<kType>(w.data, j, s);
    for (int i = 0; i < kSub; ++i) {
      out[j * kSub + i] = static_cast<float>(s.code[i]) * s.d;
      if (has_minimum(kType)) out[j * kSub + i] += s.m;
    }
  }
}

template <>
void dequantize<kF32>(const Group& w, int64_t cols, float* out) noexcept {
  std::memcpy(out, w.data, static_cast<size_t>(cols) * 4);
}

template <>
void dequantize<kF16>(const Group& w, int64_t cols, float* out) noexcept {
  for (int64_t i = 0; i < cols; ++i) out[i] = half(w.data + 2 * i);
}

template <>
void dequantize<kBF16>(const Group& w, int64_t cols, float* out) noexcept {
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

template <int kType>
void add_format(LinearKernels& k) noexcept {
  k.of[kType] = {0, gemv<kType>, unpack<kType>, gemm<kType>};
  k.dequantize[kType] = dequantize<kType>;
}

}  // namespace

void use_scalar(LinearKernels& k) noexcept {
  k.rows = 1;
  k.tokens = 4;
  k.quantize = quantize;
  add_format<kQ4_0>(k);
  add_format<kQ4_1>(k);
  add_format<kQ5_0>(k);
  add_format<kQ5_1>(k);
  add_format<kQ8_0>(k);
  add_format<kQ4_K>(k);
  add_format<kQ5_K>(k);
  add_format<kQ6_K>(k);
  add_format<kIQ4_NL>(k);
  add_format<kIQ4_XS>(k);
  k.dequantize[kF32] = dequantize<kF32>;
  k.dequantize[kF16] = dequantize<kF16>;
  k.dequantize[kBF16] = dequantize<kBF16>;
  k.gemm_float = gemm_float;
}

void dequantize_row(int type, const uint8_t* row, int64_t cols, float* out) noexcept {
  static const LinearKernels k = [] {
    LinearKernels table{};
    use_scalar(table);
    return table;
  }();
  k.dequantize[type]({row, 0, row}, cols, out);
}

}  // namespace bezel
