#include "linear/linear_inputs.h"

#include <cstring>

namespace bezel {

namespace {

struct Layouts {
  Layout of[kTypes] = {};

  constexpr Layouts() {
#define BEZEL_LAYOUT(format, name, type, ...) of[type] = {name, __VA_ARGS__};
    BEZEL_FORMATS(BEZEL_LAYOUT)
#undef BEZEL_LAYOUT
  }
};

constexpr Layouts kLayouts;

}  // namespace

const Layout* layout(int64_t type) {
  return type >= 0 && type < kTypes && kLayouts.of[type].block > 0 ? &kLayouts.of[type] : nullptr;
}

Inputs::Inputs(Workspace& workspace, const LinearKernels& kernels, int64_t tokens_, int64_t columns,
               const Matrix* const* w, int count, Activations activations)
    : k(kernels), n(tokens_), cols(columns), mode_(activations) {
  const int64_t room = padded(n), blocks = cols / kXBlock;
  for (int i = 0; i < count; ++i) {
    const Layout& format = *layout(w[i]->type);
    if (mode_ == Activations::f32 || format.sub == 0) {
      floats_ = workspace.get<float>(Workspace::kFloats, room * cols);
    } else if (bias_of(*w[i]) == nullptr) {
      q_ = workspace.get<int8_t>(Workspace::kQ, room * cols);
      d_ = workspace.get<float>(Workspace::kScales, room * blocks);
      sums_ = workspace.get<int32_t>(Workspace::kSums, 2 * room * blocks);
      const int slot = Workspace::kBias + static_cast<int>(biases_.size());
      const int64_t size = room * (cols / format.sub);
      if (format.minimum)
        biases_.push_back({-1, format.sub, nullptr, workspace.get<float>(slot, size)});
      else
        biases_.push_back({k.of[w[i]->type].zero, format.sub, workspace.get<int32_t>(slot, size), nullptr});
    }
  }
}

void Inputs::fill(ThreadPool& pool, const float* x) {
  pool.parallel_for(n, k.tokens, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t t = begin; t < end; ++t) put(t, 0, cols, x + t * cols);
  });
  close(pool);
}

void Inputs::put(int64_t token, int64_t col, int64_t count, const float* x) noexcept {
  const int64_t tile = token / k.tokens, first = tile * k.tokens, t = token - first, stride = tokens(tile);
  if (q_ != nullptr) {
    const int64_t blocks = cols / kXBlock, at = first * blocks + col / kXBlock * stride;
    k.quantize(x, count / kXBlock, static_cast<int>(stride), q_ + (at + t) * kXBlock, d_ + at + t,
               sums_ + 2 * at + t);
  }
  if (floats_ != nullptr) {
    float* out = floats_ + first * cols + col * stride + t;
    for (int64_t c = 0; c < count; ++c) out[c * stride] = x[c];
  }
}

void Inputs::close(ThreadPool& pool) {
  pad(tiles() - 1);
  pool.parallel_for(q_ == nullptr ? 0 : tiles(), 1, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (k.arrange != nullptr && tiles() > 1 && tokens(tile) > 1)
        k.arrange(q_ + tile * k.tokens * cols, cols / kXBlock, tokens(tile));
      for (const Bias& bias : biases_) fold(bias, tile);
    }
  });
}

// Zeros for the tokens that fill up a tile.
void Inputs::pad(int64_t tile) const noexcept {
  const int64_t first = tile * k.tokens, blocks = cols / kXBlock, stride = tokens(tile);
  for (int64_t t = n - first; t < stride; ++t) {
    for (int64_t i = first * blocks + t, b = 0; q_ != nullptr && b < blocks; ++b, i += stride) {
      std::memset(q_ + i * kXBlock, 0, kXBlock);
      d_[i] = 0.0f;
      sums_[2 * i - t] = sums_[2 * i - t + stride] = 0;
    }
    for (int64_t c = 0; floats_ != nullptr && c < cols; ++c) floats_[first * cols + c * stride + t] = 0.0f;
  }
}

const Inputs::Bias* Inputs::bias_of(const Matrix& w) const {
  const Layout& format = *layout(w.type);
  if (mode_ == Activations::f32) return nullptr;
  const int zero = format.minimum ? -1 : k.of[w.type].zero;
  for (const Bias& bias : biases_)
    if (bias.zero == zero && bias.sub == format.sub) return &bias;
  return nullptr;
}

void Inputs::fold(const Bias& bias, int64_t tile) const noexcept {
  const int64_t blocks = cols / kXBlock, stride = tokens(tile), first = tile * k.tokens * blocks;
  const int32_t* sums = sums_ + 2 * first;
  const float* d = d_ + first;
  const int64_t subs = kXBlock / bias.sub;
  int64_t at = first * subs;
  for (int64_t b = 0; b < blocks; ++b, sums += 2 * stride, d += stride)
    for (int64_t h = 0; h < subs; ++h)
      for (int64_t t = 0; t < stride; ++t, ++at) {
        const int32_t sum = sums[h * stride + t] + (subs == 1 ? sums[stride + t] : 0);
        if (bias.moments != nullptr) bias.moments[at] = d[t] * static_cast<float>(sum);
        else bias.ints[at] = -bias.zero * sum;
      }
}

Tile Inputs::at(const Bias& bias, int64_t tile, int64_t block) const {
  const int64_t i = tile * k.tokens * (cols / kXBlock) + block * tokens(tile), at = i * (kXBlock / bias.sub);
  return {q_ + i * kXBlock, d_ + i,
          bias.moments != nullptr ? static_cast<const void*>(bias.moments + at) : bias.ints + at};
}

}  // namespace bezel
