// The kernels that are written once, on vectors, and compiled for each instruction set.
#pragma once

#include "attention/attention_kernels.h"
#include "base/cpu.h"
#include "elementwise/elementwise_kernels.h"

namespace bezel {

struct VectorKernels {
  AttentionKernels attention;
  ElementwiseKernels elementwise;
};

// vector_scalar, vector_avx2, …
#define BEZEL_DECLARE(isa) const VectorKernels& vector_##isa() noexcept;
BEZEL_ISAS(BEZEL_DECLARE)
#undef BEZEL_DECLARE

// Those of `isa`, which must be usable here. All give the same bits, damaged numbers apart.
const VectorKernels& vector_kernels(Isa isa) noexcept;

// For selected_isa(), and throws what it throws.
const VectorKernels& vector_kernels();

}  // namespace bezel
