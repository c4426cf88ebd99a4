// The table of kernels, filled at run time with the best that the processor can run.
//
// A kernel file is compiled with the flags of its instruction set. Its helpers are `static`, and it calls no
// template or inline function of the standard library: the linker keeps one copy of those for the whole program,
// and it must not be the copy that only a new processor can run.
#pragma once

#include <cstdint>

namespace bezel {

constexpr int64_t kBlock = 32;              // weights, and activations, that share a scale
constexpr int64_t kQ8_0Bytes = 2 + kBlock;  // a Q8_0 block: float16 scale, 32 int8; blocks have no alignment

struct Kernels {
  // Quantizes x to int8: in each block scale = max|x| / 127 and q = x · (1 / scale), to nearest, ties to even.
  // A block whose scale would be subnormal becomes zero; one with an infinity or a NaN gets a NaN as its scale,
  // so that the damage shows in the result.
  void (*quantize_q8)(const float* x, int64_t blocks, int8_t* q, float* scales) noexcept;

  // y[r] = Σ over blocks of (weight scale · activation scale) · integer dot product, for `rows` rows.
  void (*gemv_q8_0)(const uint8_t* weights, int64_t rows, int64_t blocks, const int8_t* q, const float* scales,
                    float* y) noexcept;
};

// Each replaces the entries that its instruction set does better, and leaves the others.
void use_scalar(Kernels& kernels) noexcept;

// For selected_isa(), and throws what it throws.
const Kernels& kernels();

}  // namespace bezel
