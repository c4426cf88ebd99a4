#define BEZEL_AVX2
#define BEZEL_AVXVNNI
#include "attention_impl.h"
#include "elementwise_impl.h"
#include "vector_kernels.h"

namespace bezel {

const VectorKernels& vector_avxvnni() noexcept {
  static constexpr VectorKernels kernels{kAttention, kElementwise};
  return kernels;
}

}  // namespace bezel
