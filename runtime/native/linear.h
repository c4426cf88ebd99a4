// Matrices of a model file times activations.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "thread_pool.h"

namespace bezel {

struct LinearKernels;

// A row-major matrix of one of GGUF's types, used where it lies: `data` may have any alignment, may be
// read-only, and must outlive the matrix.
struct Matrix {
  // Throws std::invalid_argument for an unknown type, and where rows of `cols` weights do not have row_bytes
  // bytes.
  Matrix(const uint8_t* data, int64_t rows, int64_t row_bytes, int64_t type, int64_t cols);

  const uint8_t* data;
  int64_t rows, cols, row_bytes;
  int type;
};

enum class Activations {
  int8,  // quantized per block of 32, for matrices of quantized types; float types see float32
  f32,   // slow: for measuring what quantizing the activations costs
};

// y[i] (n, w[i]->rows) = x (n, cols) · w[i]ᵀ, where all matrices have the same number of columns. An output
// has the same bits whatever n, the other tokens, the other matrices, the threads, or the instruction set.
// Throws what selected_isa() throws, and std::bad_alloc.
void linear(ThreadPool& pool, const float* x, int64_t n, const Matrix* const* w, int count, float* const* y,
            Activations activations = Activations::int8);

// The same with the kernels of any instruction set that can run here.
const LinearKernels& linear_kernels(Isa isa);
void linear(const LinearKernels& kernels, ThreadPool& pool, const float* x, int64_t n, const Matrix* const* w,
            int count, float* const* y, Activations activations);

// out (n, cols) = rows ids[0 … n) of w, times scale. Every id is a row of w.
void embed(const Matrix& w, const int64_t* ids, int64_t n, float scale, float* out);

}  // namespace bezel
