// AVX2, FMA, F16C, AVX-VNNI.
#if defined(__x86_64__) || defined(_M_X64)
#define BEZEL_AVXVNNI 1
#include "linear/linear_avx2.h"

namespace bezel {
const LinearKernels& linear_avxvnni() noexcept {
  static constexpr LinearKernels kernels = vector_table();
  return kernels;
}
}  // namespace bezel
#endif
