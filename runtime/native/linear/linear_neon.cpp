// The NEON of every 64-bit Arm processor.
#if defined(__aarch64__) || defined(_M_ARM64)
#define BEZEL_DOT 0
#include "linear/linear_neon.h"

namespace bezel {
const LinearKernels& linear_neon() noexcept {
  static constexpr LinearKernels kernels = vector_table();
  return kernels;
}
}  // namespace bezel
#endif
