// Matrix times vector, over a pool.
#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace bezel {

// y (rows) = weights (rows × blocks Q8_0 blocks, at any alignment) · x (32 · blocks), with x quantized to int8.
// A row is summed by one thread, so y does not depend on their number. Throws what selected_isa() throws.
void gemv_q8_0(const uint8_t* weights, int64_t rows, int64_t blocks, const float* x, ThreadPool& pool,
               float* y);

}  // namespace bezel
