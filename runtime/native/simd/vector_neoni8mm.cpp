#include "simd/vector_kernels.h"

namespace bezel {

// SMMLA has nothing to offer to these.
const VectorKernels& vector_neoni8mm() noexcept { return vector_neondot(); }

}  // namespace bezel
