#define BEZEL_AVX2
#include "attention_impl.h"
#include "elementwise_impl.h"
#include "vector_kernels.h"

namespace bezel {

const VectorKernels& vector_avx2() noexcept {
  static constexpr VectorKernels kernels{kAttention, kElementwise};
  return kernels;
}

}  // namespace bezel
