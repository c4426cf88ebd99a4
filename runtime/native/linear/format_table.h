// The number formats that linear() reads, a line each: all that lists formats walks these tables. What a line cannot
// say, how the bytes of a block are read, is a struct of the format's name in linear_scalar.cpp and linear_formats.h.
#pragma once

#include <cstdint>

namespace bezel {

// The name in C++ and in messages; GGUF's number; weights and bytes in a block; weights that share a scale, and whether
// these share a minimum too.
#define BEZEL_FLOAT_FORMATS(X)          \
  X(F32, "f32", 0, 1, 4, 0, false)      \
  X(F16, "f16", 1, 1, 2, 0, false)      \
  X(BF16, "bf16", 30, 1, 2, 0, false)

#define BEZEL_BLOCK_FORMATS(X)               \
  X(Q4_0, "q4_0", 2, 32, 18, 32, false)      \
  X(Q4_1, "q4_1", 3, 32, 20, 32, true)       \
  X(Q5_0, "q5_0", 6, 32, 22, 32, false)      \
  X(Q5_1, "q5_1", 7, 32, 24, 32, true)       \
  X(Q8_0, "q8_0", 8, 32, 34, 32, false)      \
  X(Q2_K, "q2_k", 10, 256, 84, 16, true)     \
  X(Q3_K, "q3_k", 11, 256, 110, 16, false)   \
  X(Q4_K, "q4_k", 12, 256, 144, 32, true)    \
  X(Q5_K, "q5_k", 13, 256, 176, 32, true)    \
  X(Q6_K, "q6_k", 14, 256, 210, 16, false)   \
  X(IQ4_NL, "iq4_nl", 20, 32, 18, 32, false) \
  X(IQ4_XS, "iq4_xs", 23, 256, 136, 32, false)

#define BEZEL_FORMATS(X) BEZEL_FLOAT_FORMATS(X) BEZEL_BLOCK_FORMATS(X)

constexpr int kTypes = 31;  // GGUF's numbers are below

namespace formats {
#define BEZEL_FACTS(format, name, type, block, bytes, sub, minimum)                \
  struct format {                                                                  \
    static constexpr int kType = type, kBlock = block, kBytes = bytes, kSub = sub; \
    static constexpr bool kMinimum = minimum;                                      \
  };
BEZEL_FORMATS(BEZEL_FACTS)
#undef BEZEL_FACTS
}  // namespace formats

// What the codes of IQ4_NL and IQ4_XS stand for.
constexpr int8_t kIQ4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};

}  // namespace bezel
