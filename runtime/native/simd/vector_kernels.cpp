#include "simd/vector_kernels.h"

namespace bezel {

const VectorKernels& vector_kernels(Isa isa) noexcept {
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::avx2: return vector_avx2();
    case Isa::avxvnni: return vector_avxvnni();
    case Isa::avx512vnni: return vector_avx512();
#elif defined(__aarch64__) || defined(_M_ARM64)
    case Isa::neon: return vector_neon();
    case Isa::neondot:
    case Isa::neoni8mm: return vector_neondot();
#endif
    default: return vector_scalar();
  }
}

const VectorKernels& vector_kernels() { return vector_kernels(selected_isa()); }

}  // namespace bezel
