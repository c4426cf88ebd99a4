// Norms, activations and rotary embedding over a pool. A result is the same bits on any number of threads.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"

namespace bezel {

// All arrays are rows of `dim` floats, `n` of them. elementwise_kernels.h has the formulas.
void rms_norm(const float* x, const float* weight, float eps, int64_t n, int64_t dim, ThreadPool& pool, float* y);
void add_norm(const float* x, const float* h, const float* post, const float* next, float eps, int64_t n, int64_t dim,
              ThreadPool& pool, float* sum, float* y);
void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n, int64_t dim,
                ThreadPool& pool, float* y);
void bias_gelu(float* x, const float* bias, int64_t n, int64_t dim, ThreadPool& pool);
void softcap(float* x, float cap, int64_t n, ThreadPool& pool);

// Rotates x (n, heads, head_dim) in place, row i for positions[i], by the frequencies base^(−2i / head_dim) / factor.
// Throws std::bad_alloc.
void rope(float* x, int64_t n, int64_t heads, int64_t head_dim, const int64_t* positions, double base, float factor,
          ThreadPool& pool);

}  // namespace bezel
