// The kernels of norms, activations and rotary embedding, each on one row or on any run of elements.
#pragma once

#include <cstdint>

namespace bezel {

struct ElementwiseKernels {
  // y = x / sqrt(mean x² + eps) · weight
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y) noexcept;
  // x' = x + rms_norm(h, post), or x + h where post is null; y = rms_norm(x', next)
  void (*add_norm)(const float* x, const float* h, const float* post, const float* next, float eps, int64_t n,
                   float* sum, float* y) noexcept;
  // y = (x − mean x) / sqrt(mean (x − mean x)² + eps) · weight + bias
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* y) noexcept;
  // y = gelu_tanh(gate) · up
  void (*geglu)(const float* gate, const float* up, int64_t n, float* y) noexcept;
  // x = gelu_tanh(x + bias)
  void (*bias_gelu)(float* x, const float* bias, int64_t n) noexcept;
  void (*softcap)(float* x, float cap, int64_t n) noexcept;
  // One head of 2 · half elements, in place.
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half) noexcept;
};

}  // namespace bezel
