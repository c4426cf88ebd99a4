#include "simd/vector_kernels.h"

namespace bezel {

const VectorKernels& vector_kernels(Isa isa) noexcept {
#define BEZEL_KERNELS(isa) vector_##isa,
  static constexpr decltype(&vector_scalar) of[] = {BEZEL_ISAS(BEZEL_KERNELS)};
#undef BEZEL_KERNELS
  return of[static_cast<int>(isa)]();
}

const VectorKernels& vector_kernels() { return vector_kernels(selected_isa()); }

}  // namespace bezel
