// Which instruction sets this processor and operating system can run.
#pragma once

#include <vector>

namespace bezel {

// X(name) for each set that a build for this processor has kernels for, best last. CMakeLists.txt has the same list.
// avx2: with FMA and F16C. avxvnni: and int8 dot products on 256 bits. avx512vnni: AVX-512 F, BW, VL, DQ, VNNI.
// neondot: and SDOT. neoni8mm: and SMMLA.
#if defined(__x86_64__) || defined(_M_X64)
#define BEZEL_ISAS(X) X(scalar) X(avx2) X(avxvnni) X(avx512vnni)
#elif defined(__aarch64__) || defined(_M_ARM64)
#define BEZEL_ISAS(X) X(scalar) X(neon) X(neondot) X(neoni8mm)
#else
#define BEZEL_ISAS(X) X(scalar)
#endif

#define BEZEL_ENUMERATOR(isa) isa,
enum class Isa { BEZEL_ISAS(BEZEL_ENUMERATOR) };
#undef BEZEL_ENUMERATOR

const char* name(Isa isa) noexcept;

// Everything that can run here, best last; the first is always scalar.
const std::vector<Isa>& usable_isas();

// The one that the kernels use: BEZEL_ISA if it is set, else the best. It is settled by the first call that
// succeeds. Throws std::invalid_argument where BEZEL_ISA names none that can run here.
Isa selected_isa();

}  // namespace bezel
