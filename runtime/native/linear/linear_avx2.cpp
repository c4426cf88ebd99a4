// AVX2, FMA, F16C.
#if defined(__x86_64__) || defined(_M_X64)
#define BEZEL_AVXVNNI 0
#include "linear/linear_avx2.h"

namespace bezel {
void use_avx2(LinearKernels& kernels) noexcept { fill(kernels); }
}  // namespace bezel
#endif
