// exp and tanh on vectors, the same bits on every instruction set. The tests go through every float32.
#pragma once

#include "simd/vector.h"

namespace bezel {
namespace {

// e^x for x ≤ 0, within 1 ulp; 0 below −87, where float32 soon has no normal numbers left. NaN stays NaN.
BEZEL_OP F exp_nonpositive(F x) {
  // x = n · ln 2 + r with |r| ≤ ln 2 / 2. The large constant makes the addition round to an integer and leaves
  // n + 127, the exponent of 2^n, in the low bits.
  const F shifted = fma(x, set(0x1.715476p+0f), set(0x1.8p23f + 127.0f));
  const F n = sub(shifted, set(0x1.8p23f + 127.0f));
  const F r = fnma(n, set(-0x1.05c61p-29f), fnma(n, set(0x1.62e43p-1f), x));
  // Minimax with the first two coefficients fixed to 1; relative error 3.1e-9.
  F y = fma(set(0x1.6a23cep-10f), r, set(0x1.123a2p-7f));
  y = fma(y, r, set(0x1.5558f2p-5f));
  y = fma(y, r, set(0x1.555492p-3f));
  y = fma(y, r, set(0x1.fffffcp-2f));
  y = fma(y, r, set(1.0f));
  y = fma(y, r, set(1.0f));
  y = mul(y, from_bits(shift_left<23>(bits(shifted))));
  return select(less(x, set(-87.0f)), set(0.0f), y);
}

// tanh x within 5.2 ulp, odd, and ±1 beyond |x| = 8.1. NaN stays NaN.
BEZEL_OP F tanh(F x) {
  // x · P(x²) / Q(x²): minimax on 0 … 8.12, relative error 7.5e-9. No coefficient is negative, so nothing cancels.
  const F y = mul(x, x);
  F p = fma(set(0x1.019f7cp-26f), y, set(0x1.6cbd9ep-16f));
  F q = fma(set(0x1.c4a574p-21f), y, set(0x1.64236ep-12f));
  p = fma(p, y, set(0x1.d2f75ap-9f));
  q = fma(q, y, set(0x1.ac20bp-6f));
  p = fma(p, y, set(0x1.13311p-3f));
  q = fma(q, y, set(0x1.deedd8p-2f));
  p = mul(fma(p, y, set(1.0f)), x);
  q = fma(q, y, set(1.0f));
  const F inside = div(p, q);
  const F above = select(less(set(8.1f), x), set(1.0f), inside);
  return select(less(x, set(-8.1f)), set(-1.0f), above);
}

}  // namespace
}  // namespace bezel
