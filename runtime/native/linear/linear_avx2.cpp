// AVX2, FMA, F16C.
#if defined(__x86_64__) || defined(_M_X64)
#define BEZEL_AVXVNNI 0
#include "linear/linear_avx2.h"

namespace bezel {
const LinearKernels& linear_avx2() noexcept {
  static constexpr LinearKernels kernels = vector_table();
  return kernels;
}
}  // namespace bezel
#endif
