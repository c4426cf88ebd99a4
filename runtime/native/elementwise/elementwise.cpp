#include "elementwise/elementwise.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "simd/vector_kernels.h"

namespace bezel {
namespace {

constexpr int64_t kGrain = 16 * 1024;  // elements for which another thread pays

int64_t rows_per_task(int64_t dim) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(dim, 1)); }

// Cosines and sines of a pass's positions. Every layer of it asks for the same ones, so each thread keeps its last, of
// two frequencies, because some models turn their local layers by others than their global ones.
struct Angles {
  double base = 0;
  float factor = 0;
  int64_t half = 0;
  std::vector<int64_t> positions;
  std::vector<float> cos, sin;  // (n, half)
};

// float32 angles, as ops.py: the frequency is rounded, and so are its quotient and its product with the position.
void fill(Angles& a, ThreadPool& pool) {
  const int64_t n = static_cast<int64_t>(a.positions.size());
  std::vector<float> frequency(static_cast<size_t>(a.half));
  for (int64_t i = 0; i < a.half; ++i)
    frequency[static_cast<size_t>(i)] =
        static_cast<float>(std::pow(a.base, -(static_cast<double>(i) / static_cast<double>(a.half)))) / a.factor;
  a.cos.resize(static_cast<size_t>(n * a.half));
  a.sin.resize(static_cast<size_t>(n * a.half));
  pool.parallel_for(n, 8, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t i = begin * a.half; i < end * a.half; ++i) {
      const float position = static_cast<float>(a.positions[static_cast<size_t>(i / a.half)]);
      const double angle = position * frequency[static_cast<size_t>(i % a.half)];
      a.cos[static_cast<size_t>(i)] = static_cast<float>(std::cos(angle));
      a.sin[static_cast<size_t>(i)] = static_cast<float>(std::sin(angle));
    }
  });
}

const Angles& angles(double base, float factor, int64_t half, const int64_t* positions, int64_t n, ThreadPool& pool) {
  thread_local Angles kept[2];
  thread_local int oldest = 0;
  for (const Angles& a : kept)
    if (a.base == base && a.factor == factor && a.half == half &&
        std::equal(a.positions.begin(), a.positions.end(), positions, positions + n))
      return a;
  Angles fresh{base, factor, half, {positions, positions + n}, {}, {}};
  fill(fresh, pool);
  oldest ^= 1;
  return kept[oldest ^ 1] = std::move(fresh);
}

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, int64_t n, int64_t dim, ThreadPool& pool, float* y) {
  const ElementwiseKernels& k = vector_kernels().elementwise;
  pool.parallel_for(n, rows_per_task(dim), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t r = begin; r < end; ++r) k.rms_norm(x + r * dim, weight, eps, dim, y + r * dim);
  });
}

void add_norm(const float* x, const float* h, const float* post, const float* next, float eps, int64_t n, int64_t dim,
              ThreadPool& pool, float* sum, float* y) {
  const ElementwiseKernels& k = vector_kernels().elementwise;
  pool.parallel_for(n, rows_per_task(dim), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t r = begin * dim; r < end * dim; r += dim)
      k.add_norm(x + r, h + r, post, next, eps, dim, sum + r, y + r);
  });
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n, int64_t dim,
                ThreadPool& pool, float* y) {
  const ElementwiseKernels& k = vector_kernels().elementwise;
  pool.parallel_for(n, rows_per_task(dim), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t r = begin * dim; r < end * dim; r += dim) k.layer_norm(x + r, weight, bias, eps, dim, y + r);
  });
}

void bias_gelu(float* x, const float* bias, int64_t n, int64_t dim, ThreadPool& pool) {
  const ElementwiseKernels& k = vector_kernels().elementwise;
  pool.parallel_for(n, rows_per_task(dim), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t r = begin * dim; r < end * dim; r += dim) k.bias_gelu(x + r, bias, dim);
  });
}

void softcap(float* x, float cap, int64_t n, ThreadPool& pool) {
  const ElementwiseKernels& k = vector_kernels().elementwise;
  pool.parallel_for(n, kGrain, [&](int64_t begin, int64_t end) noexcept {
    k.softcap(x + begin, cap, end - begin);
  });
}

void rope(float* x, int64_t n, int64_t heads, int64_t head_dim, const int64_t* positions, double base, float factor,
          ThreadPool& pool) {
  const ElementwiseKernels& k = vector_kernels().elementwise;
  const int64_t half = head_dim / 2;
  const Angles& a = angles(base, factor, half, positions, n, pool);
  pool.parallel_for(n, rows_per_task(heads * head_dim), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t h = 0; h < heads; ++h)
        k.rope(x + (i * heads + h) * head_dim, a.cos.data() + i * half, a.sin.data() + i * half, half);
  });
}

}  // namespace bezel
