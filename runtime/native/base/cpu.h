// Which instruction sets this processor and operating system can run.
#pragma once

#include <vector>

namespace bezel {

enum class Isa {
  scalar,
  avx2,        // AVX2, FMA, F16C
  avxvnni,     // and AVX-VNNI: int8 dot products on 256 bits
  avx512vnni,  // AVX-512 F, BW, VL, DQ, VNNI
  neon,
  neondot,   // and SDOT
  neoni8mm,  // and SMMLA
};

const char* name(Isa isa) noexcept;

// Everything that can run here, best last; the first is always scalar.
const std::vector<Isa>& usable_isas();

// The one that the kernels use: BEZEL_ISA if it is set, else the best. It is settled by the first call that
// succeeds. Throws std::invalid_argument where BEZEL_ISA names none that can run here.
Isa selected_isa();

}  // namespace bezel
