// 256-bit registers for the probes; each instruction set adds its `dot`.
#pragma once

#include <immintrin.h>

#include "probe/probe_loops.h"

namespace bezel {
namespace {

struct Ymm {
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr int kSums = 10, kDotOps = 64, kFmaOps = 16;  // no more: GCC would spill
  static Ints ints(int value) { return _mm256_set1_epi32(value); }
  static Ints load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Ints add64(Ints a, Ints b) { return _mm256_add_epi64(a, b); }
  static uint64_t fold64(Ints a) {
    alignas(32) uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), a);
    return words[0] + words[1] + words[2] + words[3];
  }
  static Floats floats(float value) { return _mm256_set1_ps(value); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static uint64_t bits(Floats a) { return fold64(_mm256_castps_si256(a)); }
};

}  // namespace
}  // namespace bezel
