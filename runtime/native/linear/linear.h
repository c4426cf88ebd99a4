// Matrices of a model file times activations.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "base/thread_pool.h"

namespace bezel {

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
// has the same bits whatever n, the other tokens, the other matrices, the threads, or the instruction set,
// which must be one that can run here. Throws std::bad_alloc.
void linear(Isa isa, ThreadPool& pool, const float* x, int64_t n, const Matrix* const* w, int count,
            float* const* y, Activations activations = Activations::int8);

// y (n, down.rows) = (gelu(x · gateᵀ) ⊙ (x · upᵀ)) · downᵀ, with the same promise; as many rows in gate and up as
// columns in down. The bits are those of linear(), geglu() and linear(), but what lies between them never leaves the
// caches whole.
void feed_forward(Isa isa, ThreadPool& pool, const float* x, int64_t n, const Matrix& gate, const Matrix& up,
                  const Matrix& down, float* y, Activations activations = Activations::int8);

// out (n, cols) = rows ids[0 … n) of w, times scale. Every id is a row of w.
void embed(const Matrix& w, const int64_t* ids, int64_t n, float scale, float* out);

}  // namespace bezel
