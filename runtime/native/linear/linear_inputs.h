// The activations of a call to linear(), in the forms that its matrices need.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "linear/linear.h"
#include "linear/linear_kernels.h"

namespace bezel {

struct Layout {  // of a GGUF type
  const char* name;
  int block, bytes;
  int sub;  // weights that share a scale; 0 for float types
  bool minimum;
};

// Null for a type without kernels.
const Layout* layout(int64_t type);

// Memory that a calling thread keeps from call to call: giving megabytes back to the system and taking them
// again would cost as much as a small matrix. Uninitialised, and aligned to a cache line.
class Workspace {
 public:
  enum Slot { kQ, kScales, kSums, kFloats, kAcc, kTail, kScratch, kRows, kBias };  // and as many biases as needed

  template <class T>
  T* get(int slot, int64_t count) {
    if (static_cast<size_t>(slot) >= slots_.size()) slots_.resize(static_cast<size_t>(slot) + 1);
    Memory& memory = slots_[static_cast<size_t>(slot)];
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > memory.size) {
      memory = {};
      memory.data.reset(::operator new(static_cast<size_t>(bytes), std::align_val_t(kAlign)));
      memory.size = bytes;
    }
    return static_cast<T*>(memory.data.get());
  }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(kAlign)); }
  };
  struct Memory {
    std::unique_ptr<void, Free> data;
    int64_t size = 0;
  };
  std::vector<Memory> slots_;
};

// Tiles have k.tokens tokens; the last one 1 … 4, 6, or a multiple of 4, of which some may be padding.
inline int64_t padded(int64_t tokens) { return tokens <= 4 ? tokens : tokens <= 6 ? 6 : (tokens + 3) / 4 * 4; }

// n rows of `cols` activations in tiles. Tile i begins where its first token would, since all tiles before it are
// full. They are put in whole, by `fill`, or piece by piece, by `put` and in the end `close`.
class Inputs {
 public:
  // How the sums of a type's activations enter: by a zero point, or by a minimum (zero = −1).
  struct Bias {
    int zero, sub;
    int32_t* ints;
    float* moments;
  };

  Inputs(Workspace& workspace, const LinearKernels& kernels, int64_t n, int64_t cols, const Matrix* const* w,
         int count, Activations activations);

  void fill(ThreadPool& pool, const float* x);  // x (n, cols)

  // `count` activations of one token, from column `col` on: both whole blocks, except where all matrices are floats.
  void put(int64_t token, int64_t col, int64_t count, const float* x) noexcept;
  void close(ThreadPool& pool);

  // What w multiplies: null where that is float32.
  const Bias* bias_of(const Matrix& w) const;

  int64_t tiles() const { return (n + k.tokens - 1) / k.tokens; }
  int tokens(int64_t tile) const {
    return static_cast<int>(padded(std::min<int64_t>(k.tokens, n - tile * k.tokens)));
  }
  Tile at(const Bias& bias, int64_t tile, int64_t block) const;
  const float* floats_at(int64_t tile, int64_t col) const {
    return floats_ + tile * k.tokens * cols + col * tokens(tile);
  }

  const LinearKernels& k;
  const int64_t n, cols;

 private:
  void fold(const Bias& bias, int64_t tile) const noexcept;
  void pad(int64_t tile) const noexcept;

  const Activations mode_;
  std::vector<Bias> biases_;
  int8_t* q_ = nullptr;
  float *d_ = nullptr, *floats_ = nullptr;
  int32_t* sums_ = nullptr;
};

}  // namespace bezel
