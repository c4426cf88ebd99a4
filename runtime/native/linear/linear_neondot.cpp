// NEON with SDOT.
#if defined(__aarch64__) || defined(_M_ARM64)
#define BEZEL_DOT 1
#include "linear/linear_neon.h"

namespace bezel {
void use_neondot(LinearKernels& kernels) noexcept { fill(kernels); }
}  // namespace bezel
#endif
