#define BEZEL_NEON
#include "attention_impl.h"
#include "elementwise_impl.h"
#include "vector_kernels.h"

namespace bezel {

const VectorKernels& vector_neon() noexcept {
  static constexpr VectorKernels kernels{kAttention, kElementwise};
  return kernels;
}

}  // namespace bezel
