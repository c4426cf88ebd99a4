#include "base/cpu.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) || defined(_M_X64)
#define BEZEL_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define BEZEL_ARM64 1
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif
#endif

namespace bezel {
namespace {

bool bit(uint64_t word, int i) { return (word >> i) & 1; }

#if defined(BEZEL_X86)

struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

// All zero, so no feature, where the processor has no such leaf.
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r{};
#if defined(_MSC_VER)
  int max[4], out[4];
  __cpuid(max, 0);
  if (static_cast<uint32_t>(max[0]) < leaf) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<uint32_t>(out[0]), static_cast<uint32_t>(out[1]), static_cast<uint32_t>(out[2]),
       static_cast<uint32_t>(out[3])};
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// The register states that the operating system saves: without it a feature bit of the processor means nothing.
uint64_t saved_states() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;  // by hand: the intrinsic needs -mxsave
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::scalar};
  const Registers basic = cpuid(1, 0);
  const bool fma = bit(basic.ecx, 12), osxsave = bit(basic.ecx, 27);
  const bool avx = bit(basic.ecx, 28), f16c = bit(basic.ecx, 29);
  if (!osxsave || !avx) return found;
  const uint64_t saved = saved_states();
  constexpr uint64_t kAvxState = 0x06, kAvx512State = 0xE6;  // XMM, YMM; and opmask, both halves of ZMM

  const Registers extended = cpuid(7, 0);
  const bool avx2 = bit(extended.ebx, 5) && fma && f16c && (saved & kAvxState) == kAvxState;
  if (!avx2) return found;
  found.push_back(Isa::avx2);

  const bool has_subleaf_1 = extended.eax >= 1;
  if (has_subleaf_1 && bit(cpuid(7, 1).eax, 4)) found.push_back(Isa::avxvnni);

  const bool f = bit(extended.ebx, 16), dq = bit(extended.ebx, 17), bw = bit(extended.ebx, 30);
  const bool vl = bit(extended.ebx, 31), vnni = bit(extended.ecx, 11);
  if (f && dq && bw && vl && vnni && (saved & kAvx512State) == kAvx512State) found.push_back(Isa::avx512vnni);
  return found;
}

#elif defined(BEZEL_ARM64)

std::vector<Isa> detect() {
  bool dot = false, i8mm = false;
#if defined(__linux__)
  dot = bit(getauxval(AT_HWCAP), 20);    // HWCAP_ASIMDDP
  i8mm = bit(getauxval(AT_HWCAP2), 13);  // HWCAP2_I8MM; both by number, because older headers lack the names
#elif defined(__APPLE__)
  dot = true;  // every Apple processor that runs macOS
  int value = 0;
  size_t size = sizeof value;
  i8mm = sysctlbyname("hw.optional.arm.FEAT_I8MM", &value, &size, nullptr, 0) == 0 && value != 0;
#elif defined(PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE)
  dot = IsProcessorFeaturePresent(PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE) != 0;
#endif
  std::vector<Isa> found{Isa::scalar, Isa::neon};
  if (dot) found.push_back(Isa::neondot);
  if (dot && i8mm) found.push_back(Isa::neoni8mm);
  return found;
}

#else

std::vector<Isa> detect() { return {Isa::scalar}; }

#endif

Isa choose() {
  const std::vector<Isa>& usable = usable_isas();
  const char* wanted = std::getenv("BEZEL_ISA");
  if (wanted == nullptr || *wanted == '\0') return usable.back();
  std::string names;
  for (const Isa isa : usable) {
    if (std::string(wanted) == name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::invalid_argument("BEZEL_ISA is '" + std::string(wanted) + "'; this machine can run: " + names +
                              ". Unset it to use the best.");
}

}  // namespace

const char* name(Isa isa) noexcept {
#define BEZEL_NAME(isa) #isa,
  static constexpr const char* names[] = {BEZEL_ISAS(BEZEL_NAME)};
#undef BEZEL_NAME
  return names[static_cast<int>(isa)];
}

const std::vector<Isa>& usable_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa selected_isa() {
  static const Isa isa = choose();  // an initialiser that throws is run again by the next call
  return isa;
}

}  // namespace bezel
