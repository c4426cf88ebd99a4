// The reference that every other instruction set is tested against: written for reading, and exact about the
// order of its float32 operations.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace bezel {

static float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// float16 to float32. Subnormals come from an integer: small weights have them as scales, and a thread that
// flushes float32 subnormals to zero must get them too.
static float from_half(const uint8_t* bytes) {
  const uint32_t half = bytes[0] | static_cast<uint32_t>(bytes[1]) << 8;
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  const bool negative = half >> 15;
  float value = static_cast<float>(mantissa) * 0x1p-24f;
  if (exponent == 31) value = from_bits(0x7F800000u | mantissa << 13);
  else if (exponent != 0) value = from_bits((exponent + 112) << 23 | mantissa << 13);
  return negative ? -value : value;
}

static void quantize_q8_scalar(const float* x, int64_t blocks, int8_t* q, float* scales) noexcept {
  for (int64_t b = 0; b < blocks; ++b, x += kBlock, q += kBlock) {
    uint32_t max_bits = 0;  // as integers, magnitudes keep their order, and infinity and NaN come out on top
    for (int i = 0; i < kBlock; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      bits &= 0x7FFFFFFFu;
      if (bits > max_bits) max_bits = bits;
    }
    const bool finite = max_bits < 0x7F800000u;
    const float scale = from_bits(max_bits) / 127.0f;
    const bool usable = finite && scale >= FLT_MIN;
    scales[b] = usable ? scale : finite ? 0.0f : NAN;
    if (!usable) {
      std::memset(q, 0, kBlock);
      continue;
    }
    const float inverse = 1.0f / scale;
    for (int i = 0; i < kBlock; ++i) q[i] = static_cast<int8_t>(lrintf(x[i] * inverse));
  }
}

static float dot_q8_0_q8_scalar(const uint8_t* row, int64_t blocks, const int8_t* q, const float* scales) {
  float sum = 0.0f;
  for (int64_t b = 0; b < blocks; ++b, row += kQ8_0Bytes, q += kBlock) {
    int32_t dot = 0;
    for (int i = 0; i < kBlock; ++i) dot += static_cast<int8_t>(row[2 + i]) * q[i];
    sum += from_half(row) * scales[b] * static_cast<float>(dot);
  }
  return sum;
}

static void gemv_q8_0_scalar(const uint8_t* weights, int64_t rows, int64_t blocks, const int8_t* q,
                             const float* scales, float* y) noexcept {
  for (int64_t r = 0; r < rows; ++r, weights += blocks * kQ8_0Bytes)
    y[r] = dot_q8_0_q8_scalar(weights, blocks, q, scales);
}

void use_scalar(Kernels& kernels) noexcept {
  kernels.quantize_q8 = quantize_q8_scalar;
  kernels.gemv_q8_0 = gemv_q8_0_scalar;
}

}  // namespace bezel
