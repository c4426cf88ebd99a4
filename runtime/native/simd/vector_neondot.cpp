#define BEZEL_NEON
#include "attention/attention_impl.h"
#include "elementwise/elementwise_impl.h"
#include "simd/vector_kernels.h"

namespace bezel {

const VectorKernels& vector_neondot() noexcept {
  static constexpr VectorKernels kernels{kAttention, kElementwise};
  return kernels;
}

}  // namespace bezel
