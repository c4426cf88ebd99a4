// NEON with SDOT.
#if defined(__aarch64__) || defined(_M_ARM64)
#define BEZEL_DOT 1
#include "linear/linear_neon.h"

namespace bezel {
const LinearKernels& linear_neondot() noexcept {
  static constexpr LinearKernels kernels = vector_table();
  return kernels;
}
}  // namespace bezel
#endif
