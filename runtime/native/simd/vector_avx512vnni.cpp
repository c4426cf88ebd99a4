#define BEZEL_AVX512
#include "attention/attention_impl.h"
#include "elementwise/elementwise_impl.h"
#include "simd/vector_kernels.h"

namespace bezel {

const VectorKernels& vector_avx512vnni() noexcept {
  static constexpr VectorKernels kernels{kAttention, kElementwise};
  return kernels;
}

}  // namespace bezel
