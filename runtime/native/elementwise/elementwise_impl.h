// The source of the elementwise kernels, compiled once for each instruction set (vector_*.cpp).
#pragma once

#include <cmath>

#include "elementwise/elementwise_kernels.h"
#include "simd/vector.h"
#include "simd/vector_math.h"

namespace bezel {
namespace {

// The mean of n elements, where take(i, sum) adds the vector at element i to a sum. The vectors are summed in turn into
// four accumulators, so that additions need not wait for each other.
template <class Take>
BEZEL_OP float mean(int64_t n, Take&& take) {
  F acc[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    BEZEL_UNROLL
    for (int64_t k = 0; k < 4; ++k) {
      if (i + k * kLanes >= n) break;
      acc[k] = take(i + k * kLanes, acc[k]);
    }
  }
  return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3]))) / static_cast<float>(n);
}

// 1 / sqrt(mean of f(i)² + eps), where f(i) is the vector at element i of n.
template <class Function>
BEZEL_OP float inverse_rms(int64_t n, float eps, Function&& f) {
  const float mean_square = mean(n, [&](int64_t i, F acc) {
    const F x = f(i);
    return fma(x, x, acc);
  });
  return 1.0f / sqrtf(mean_square + eps);
}

static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) noexcept {
  const F r = set(inverse_rms(n, eps, [=](int64_t i) { return load(x + i, n - i); }));
  for (int64_t i = 0; i < n; i += kLanes)
    store(y + i, mul(mul(load(x + i, n - i), r), load(weight + i, n - i)), n - i);
}

static void add_norm(const float* x, const float* h, const float* post, const float* next, float eps, int64_t n,
                     float* total, float* y) noexcept {
  const F r = set(post ? inverse_rms(n, eps, [=](int64_t i) { return load(h + i, n - i); }) : 1.0f);
  const F next_r = set(inverse_rms(n, eps, [=](int64_t i) {
    const F a = load(x + i, n - i), b = load(h + i, n - i);
    const F t = post ? fma(mul(b, r), load(post + i, n - i), a) : add(a, b);
    store(total + i, t, n - i);
    return t;
  }));
  for (int64_t i = 0; i < n; i += kLanes)
    store(y + i, mul(mul(load(total + i, n - i), next_r), load(next + i, n - i)), n - i);
}

static void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                       float* y) noexcept {
  const float center = mean(n, [=](int64_t i, F acc) { return add(acc, load(x + i, n - i)); });
  float centers[kLanes];
  for (float& c : centers) c = center;
  const auto centered = [&](int64_t i) { return sub(load(x + i, n - i), load(centers, n - i)); };  // 0 past the end
  const F r = set(inverse_rms(n, eps, centered));
  for (int64_t i = 0; i < n; i += kLanes)
    store(y + i, fma(mul(centered(i), r), load(weight + i, n - i), load(bias + i, n - i)), n - i);
}

BEZEL_OP F gelu(F x) {
  const F scale = set(0x1.988454p-1f);  // sqrt(2 / π)
  const F t = tanh(mul(mul(x, scale), fma(mul(x, x), set(0.044715f), set(1.0f))));
  return mul(mul(x, set(0.5f)), add(set(1.0f), t));
}

static void geglu(const float* gate, const float* up, int64_t n, float* y) noexcept {
  for (int64_t i = 0; i < n; i += kLanes)
    store(y + i, mul(gelu(load(gate + i, n - i)), load(up + i, n - i)), n - i);
}

static void bias_gelu(float* x, const float* bias, int64_t n) noexcept {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, gelu(add(load(x + i, n - i), load(bias + i, n - i))), n - i);
}

static void softcap(float* x, float cap, int64_t n) noexcept {
  const F inverse = set(1.0f / cap);
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, mul(set(cap), tanh(mul(load(x + i, n - i), inverse))), n - i);
}

static void rope(float* x, const float* cos, const float* sin, int64_t half) noexcept {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    const F a = load(x + i, left), b = load(x + half + i, left), c = load(cos + i, left), s = load(sin + i, left);
    store(x + i, fnma(b, s, mul(a, c)), left);
    store(x + half + i, fma(a, s, mul(b, c)), left);
  }
}

constexpr ElementwiseKernels kElementwise = {rms_norm, add_norm, layer_norm, geglu, bias_gelu, softcap, rope};

}  // namespace
}  // namespace bezel
