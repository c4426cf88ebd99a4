// Every instruction set that can run here against the scalar twin, bit for bit. Cross-compiled, it runs under
// an emulator.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "linear/linear.h"
#include "linear/linear_kernels.h"
#include "base/thread_pool.h"
#include "simd/vector_kernels.h"

using namespace bezel;

namespace {

struct Format {
  const char* name;
  int type, block, bytes, sub;
  bool minimum;
};

const Format kFormats[] = {
#define BEZEL_ROW(format, ...) {__VA_ARGS__},
    BEZEL_FORMATS(BEZEL_ROW)
#undef BEZEL_ROW
};

template <class Facts>
const Format& format() {
  return *std::find_if(std::begin(kFormats), std::end(kFormats),
                       [](const Format& f) { return f.type == Facts::kType; });
}

// Where a block has float16 fields.
std::vector<int> halves(const Format& f) {
  switch (f.type) {
    case formats::Q2_K::kType: return {80, 82};
    case formats::Q3_K::kType: return {108};
    case formats::Q6_K::kType: return {208};
  }
  return f.minimum ? std::vector<int>{0, 2} : std::vector<int>{0};
}

std::mt19937 rng(1);

float normal() { return std::normal_distribution<float>()(rng); }

// Any bytes, but for scales: halves of either sign from 2⁻²⁴ (a subnormal) to 4, and floats near 1. It ends
// where its memory ends, so that AddressSanitizer sees a read past it.
struct Weights {
  std::unique_ptr<uint8_t[]> memory;
  const uint8_t* data;

  Weights(const Format& f, int64_t rows, int64_t cols, int offset) {
    const int64_t size = rows * (cols / f.block) * f.bytes;
    memory.reset(new uint8_t[static_cast<size_t>(size + offset)]);
    uint8_t* p = memory.get() + offset;
    data = p;
    for (int64_t i = 0; i < size; ++i) p[i] = static_cast<uint8_t>(rng());
    for (uint8_t* block = p; block < p + size; block += f.bytes) {
      for (const int at : halves(f)) {
        const auto half = static_cast<uint16_t>((rng() & 0x8000) | rng() % 0x4400);
        std::memcpy(block + at, &half, 2);
      }
      const float value = normal();
      if (f.type == formats::F32::kType) std::memcpy(block, &value, 4);
      if (f.type == formats::BF16::kType) std::memcpy(block, reinterpret_cast<const uint8_t*>(&value) + 2, 2);
    }
  }
};

std::vector<float> run(Isa isa, ThreadPool& pool, const std::vector<float>& x, int64_t n, const Matrix& w,
                       Activations activations) {
  std::vector<float> y(static_cast<size_t>(n * w.rows), -1.0f);
  const Matrix* matrix = &w;
  float* out = y.data();
  linear(isa, pool, x.data(), n, &matrix, 1, &out, activations);
  return y;
}

int failures = 0;

void check(const std::vector<float>& found, const std::vector<float>& expected, Isa isa, const Format& f,
           int64_t rows, int64_t cols, int64_t n, Activations activations) {
  for (size_t i = 0; i < found.size(); ++i)
    if (std::memcmp(&found[i], &expected[i], 4) != 0 && !(std::isnan(found[i]) && std::isnan(expected[i]))) {
      std::fprintf(stderr, "%s %s rows %lld cols %lld n %lld %s: [%zu] is %.9g, expected %.9g\n", name(isa),
                   f.name, static_cast<long long>(rows), static_cast<long long>(cols),
                   static_cast<long long>(n), activations == Activations::int8 ? "int8" : "f32", i,
                   static_cast<double>(found[i]), static_cast<double>(expected[i]));
      ++failures;
      return;
    }
}

std::vector<float> activations_of(int64_t n, int64_t cols) {
  std::vector<float> x(static_cast<size_t>(n * cols));
  for (float& v : x) v = normal();
  // Blocks with one large value, with zeros only, too small to have a scale, and damaged.
  const size_t block = 32, blocks = x.size() / block;
  if (blocks > 3) x[rng() % x.size()] *= 1000;
  if (blocks > 7) std::fill_n(x.begin() + static_cast<long>(rng() % blocks * block), block, 0.0f);
  if (blocks > 15) std::fill_n(x.begin() + static_cast<long>(rng() % blocks * block), block, 1e-38f);
  if (blocks > 40) x[rng() % x.size()] = rng() % 2 ? NAN : -INFINITY;
  // All so small that next to other blocks nobody would see them: around the smallest scale.
  if (rng() % 6 == 0)
    for (float& v : x) v *= 5e-37f;
  return x;
}

void same_as_the_scalar_twin(ThreadPool& pool) {
  for (const Format& f : kFormats)
    for (const int64_t rows : {1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 65})
      for (const int64_t blocks : {1, 2, 3, 7, 8, 9, 33, 40}) {
        int64_t cols = blocks * f.block;
        if (f.block == 256) cols = (blocks % 5 + 1) * 256;  // past a panel, too
        if (f.block == 1) cols = blocks * 8 + blocks % 5;
        const Weights weights(f, rows, cols, static_cast<int>(rng() % 8));
        const Matrix w(weights.data, rows, cols / f.block * f.bytes, f.type, cols);
        for (const int64_t n : {1, 2, 3, 4, 5, 8, 9, 12, 13, 40}) {
          if (n > 5 && rng() % 4 != 0) continue;
          const std::vector<float> x = activations_of(n, cols);
          for (const Activations a : {Activations::int8, Activations::f32}) {
            if (a == Activations::f32 && rng() % 3 != 0) continue;
            const std::vector<float> expected = run(Isa::scalar, pool, x, n, w, a);
            for (const Isa isa : usable_isas())
              if (isa != Isa::scalar) check(run(isa, pool, x, n, w, a), expected, isa, f, rows, cols, n, a);
            // The twin itself: many tokens together are what each of them is alone.
            const int64_t t = static_cast<int64_t>(rng() % static_cast<uint64_t>(n));
            const std::vector<float> one(x.begin() + t * cols, x.begin() + (t + 1) * cols);
            check(run(Isa::scalar, pool, one, 1, w, a),
                  std::vector<float>(expected.begin() + t * rows, expected.begin() + (t + 1) * rows),
                  Isa::scalar, f, rows, cols, 1, a);
          }
        }
      }
}

// Bit for bit its parts, on every instruction set; what threads compute of a gate is put together by blocks of others'
// tiles.
void feed_forwards(ThreadPool& pool) {
  constexpr int64_t kCols = 256, kWidth = 1120;
  const Format &q4_0 = format<formats::Q4_0>(), &q8_0 = format<formats::Q8_0>();
  const Weights gate(q4_0, kWidth, kCols, 1), up(q8_0, kWidth, kCols, 2), down(q4_0, 33, kWidth, 3);
  const auto matrix = [](const Weights& w, const Format& f, int64_t rows, int64_t cols) {
    return Matrix(w.data, rows, cols / f.block * f.bytes, f.type, cols);
  };
  const Matrix g = matrix(gate, q4_0, kWidth, kCols), u = matrix(up, q8_0, kWidth, kCols),
               d = matrix(down, q4_0, 33, kWidth);
  for (const int64_t n : {1, 14, 300}) {
    const std::vector<float> x = activations_of(n, kCols);
    std::vector<float> gated = run(Isa::scalar, pool, x, n, g, Activations::int8);
    const std::vector<float> upped = run(Isa::scalar, pool, x, n, u, Activations::int8);
    vector_kernels(Isa::scalar).elementwise.geglu(gated.data(), upped.data(), n * kWidth, gated.data());
    const std::vector<float> expected = run(Isa::scalar, pool, gated, n, d, Activations::int8);
    for (const Isa isa : usable_isas()) {
      std::vector<float> y(static_cast<size_t>(n * 33), -1.0f);
      feed_forward(isa, pool, x.data(), n, g, u, d, y.data());
      check(y, expected, isa, q4_0, 33, kWidth, n, Activations::int8);
    }
  }
}

// More than a block of tokens, and several matrices of different formats in one call.
void large_calls(ThreadPool& pool) {
  constexpr int64_t kCols = 1280, kTokens = 300;
  const std::vector<float> x = activations_of(kTokens, kCols);
  std::vector<Weights> weights;
  std::vector<Matrix> matrices;
  const int64_t sizes[] = {40, 7, 64, 16, 50, 33, 1, 48, 20, 19, 31, 32};
  for (size_t i = 0; i < std::size(kFormats); ++i) {
    const Format& f = kFormats[i];
    const int64_t rows = sizes[i % std::size(sizes)];
    weights.emplace_back(f, rows, kCols, 1);
    matrices.emplace_back(weights.back().data, rows, kCols / f.block * f.bytes, f.type, kCols);
  }
  for (const Isa isa : usable_isas())
    for (const int64_t n : {int64_t{1}, kTokens}) {
      std::vector<std::vector<float>> y;
      std::vector<const Matrix*> w;
      std::vector<float*> out;
      for (const Matrix& m : matrices) {
        y.emplace_back(static_cast<size_t>(n * m.rows));
        w.push_back(&m);
      }
      for (std::vector<float>& v : y) out.push_back(v.data());
      linear(isa, pool, x.data(), n, w.data(), static_cast<int>(w.size()), out.data(),
             Activations::int8);
      for (size_t i = 0; i < matrices.size(); ++i)
        check(y[i], run(Isa::scalar, pool, x, n, matrices[i], Activations::int8), isa, kFormats[i],
              matrices[i].rows, kCols, n, Activations::int8);
    }
}

}  // namespace

// With an argument, only what large calls share between threads: ThreadSanitizer makes the rest take very long.
int main(int argc, char**) {
  ThreadPool one(1), three(3);
  if (argc == 1) same_as_the_scalar_twin(three);
  large_calls(three);
  large_calls(one);
  feed_forwards(three);
  if (failures == 0) {
    std::string names;
    for (const Isa isa : usable_isas()) names += std::string(" ") + name(isa);
    std::printf("ok:%s\n", names.c_str());
  }
  return failures == 0 ? 0 : 1;
}
