// Attention, caches and elementwise kernels: every instruction set that runs here against the scalar one, bit for
// bit, in whatever pieces and on however many threads. test_native_attention.py compares with NumPy.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "base/cpu.h"
#include "elementwise/elementwise.h"
#include "simd/vector_kernels.h"

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

using namespace bezel;
using Floats = std::vector<float>;

static constexpr KvType kTypes[] = {KvType::f32, KvType::f16, KvType::int8};

static Floats random(size_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 rng(seed);
  Floats x(n);
  for (float& v : x) v = scale * (static_cast<float>(rng()) * 0x1p-31f - 1.0f);
  return x;
}

static bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
}

// What each query sees.
struct Spans {
  std::vector<int64_t> first, last;

  // Of the n newest of `length` positions: `window` of them each, or all before it where that is 0.
  static Spans causal(int64_t n, int64_t length, int64_t window) {
    Spans spans;
    for (int64_t end = length - n + 1; end <= length; ++end) {
      spans.first.push_back(window ? std::max<int64_t>(0, end - window) : 0);
      spans.last.push_back(end);
    }
    return spans;
  }
};

static void attend(const KVStore& store, ThreadPool& pool, const float* queries, const Spans& spans, int64_t heads,
                   float scale, float cap, float* out) {
  attend(store, pool, queries, static_cast<int64_t>(spans.first.size()), heads, spans.first.data(), spans.last.data(),
         scale, cap, out);
}

struct Shape {
  int64_t kv_heads, group, head_dim, length, window;
  float cap;
};

// All positions through a cache of `capacity`, `chunk` at a time; the results of every query, in order.
static Floats run(const Shape& s, KvType type, const AttentionKernels& kernels, int64_t capacity, int64_t chunk,
                  ThreadPool& pool) {
  const int64_t heads = s.kv_heads * s.group, kv_row = s.kv_heads * s.head_dim, row = heads * s.head_dim;
  const Floats keys = random(static_cast<size_t>(s.length * kv_row), 1, 2.0f);
  const Floats values = random(static_cast<size_t>(s.length * kv_row), 2);
  const Floats queries = random(static_cast<size_t>(s.length * row), 3, 4.0f);
  Floats out(queries.size());
  KVStore store(s.kv_heads, s.head_dim, capacity, type, kernels);
  for (int64_t p = 0; p < s.length; p += chunk) {
    const int64_t n = std::min(chunk, s.length - p);
    store.write(pool, p, n, keys.data() + p * kv_row, values.data() + p * kv_row);
    attend(store, pool, queries.data() + p * row, Spans::causal(n, p + n, s.window), heads, 0.25f, s.cap,
           out.data() + p * row);
  }
  return out;
}

static void isas_agree_in_any_pieces(bool brief) {
  const Shape shapes[] = {
      {1, 1, 8, 70, 0, 0.0f},      {2, 2, 24, 300, 0, 50.0f},    {1, 8, 32, 530, 100, 0.0f},
      {1, 4, 80, 290, 260, 30.0f}, {1, 2, 128, 540, 513, 50.0f}, {1, 2, 256, 290, 0, 50.0f},
      {1, 1, 2, 40, 1, 0.0f},      {1, 3, 72, 270, 7, 5.0f},     {1, 7, 512, 30, 0, 50.0f},
  };
  std::vector<std::unique_ptr<ThreadPool>> pools;
  for (const int threads : {1, 2, 3, 4}) pools.push_back(std::make_unique<ThreadPool>(threads));
  for (const Shape& s : shapes)
    for (const KvType type : kTypes) {
      if (brief && &s != &shapes[1]) continue;
      const Floats expected = run(s, type, vector_kernels(Isa::scalar).attention, s.length, s.length, *pools[0]);
      for (const float x : expected) CHECK(std::isfinite(x));
      size_t pool = 0;
      for (const Isa isa : usable_isas())
        for (const int64_t chunk : {int64_t{1}, int64_t{7}, int64_t{64}, s.length}) {
          const AttentionKernels& kernels = vector_kernels(isa).attention;
          if (s.length * s.head_dim > 10000 && (chunk == 1 || isa == Isa::scalar)) continue;  // slow in an emulator
          const int64_t ring = s.window ? std::min(s.length, s.window - 1 + chunk) : s.length;
          CHECK(same_bits(run(s, type, kernels, ring, chunk, *pools[pool++ % pools.size()]), expected));
        }
    }
}

// Some see all before them, some a few positions anywhere, some each other whole, as an image's do.
static void queries_do_not_see_their_neighbours() {
  constexpr int64_t kLength = 1100, kDim = 40, kHeads = 4, kRow = kHeads * kDim;
  ThreadPool pool(3);
  for (const KvType type : kTypes)
    for (const int64_t n : {5, 170}) {
      Spans spans = Spans::causal(n, kLength, 0);
      std::mt19937 rng(static_cast<uint32_t>(n));
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
        if (i % 3 == 0) {
          spans.first[i] = static_cast<int64_t>(rng() % kLength);
          spans.last[i] = spans.first[i] + 1 + static_cast<int64_t>(rng()) % (kLength - spans.first[i]);
        } else if (i >= 60 && i < 120) {
          spans.last[i] = kLength - n + 120;
        }
      }
      const Floats keys = random(kLength * 2 * kDim, 14), values = random(kLength * 2 * kDim, 15);
      const Floats queries = random(static_cast<size_t>(n * kRow), 16, 4.0f);
      Floats expected(queries.size()), got(queries.size());
      for (const Isa isa : usable_isas()) {
        KVStore store(2, kDim, kLength, type, vector_kernels(isa).attention);
        store.write(pool, 0, kLength, keys.data(), values.data());
        attend(store, pool, queries.data(), spans, kHeads, 0.25f, 50.0f, got.data());
        if (isa != Isa::scalar) {
          CHECK(same_bits(got, expected));
          continue;
        }
        expected = got;  // and each query alone
        for (int64_t i = 0; i < n; ++i)
          attend(store, pool, queries.data() + i * kRow, {{spans.first[i]}, {spans.last[i]}}, kHeads, 0.25f, 50.0f,
                 got.data() + i * kRow);
        CHECK(same_bits(got, expected));
      }
    }
}

static void sizes_are_announced() {
  const AttentionKernels& kernels = vector_kernels(Isa::scalar).attention;
  const Floats x(300 * 3 * 40, 1.0f);
  ThreadPool pool(2);
  for (const KvType type : kTypes) {
    KVStore store(3, 40, 600, type, kernels);
    for (int64_t end = 0; end <= 2000; end += 250) {
      CHECK(store.nbytes() == KVStore::bytes_for(3, 40, 600, type, kernels, end));
      store.write(pool, end, 250, x.data(), x.data());
    }
  }
}

static void hadamard_is_its_matrix() {
  for (int64_t n = 2; n <= kMaxHeadDim; n *= 2) {
    const Floats x = random(static_cast<size_t>(n), 17);
    Floats expected = x;
    vector_kernels(Isa::scalar).attention.hadamard(expected.data(), n);
    double magnitude = 0;
    for (const float v : x) magnitude += std::fabs(v);
    for (int64_t row = 0; row < n; ++row) {
      double exact = 0;
      for (int64_t i = 0; i < n; ++i) {
        int sign = 0;
        for (int64_t both = row & i; both; both &= both - 1) sign ^= 1;
        exact += sign ? -x[static_cast<size_t>(i)] : x[static_cast<size_t>(i)];
      }
      // Each number goes through a rounding for each of log2 n ≤ 9 additions, that of the root and that of the product.
      const double root = std::sqrt(static_cast<double>(n));
      CHECK(std::fabs(expected[static_cast<size_t>(row)] - exact / root) <= 11 * 0x1p-24 * magnitude / root);
    }
    for (const Isa isa : usable_isas()) {
      Floats y = x;
      vector_kernels(isa).attention.hadamard(y.data(), n);
      CHECK(same_bits(y, expected));
    }
  }
}

static void stored_rows_come_back() {
  ThreadPool pool(2);
  for (const Isa isa : usable_isas())
    for (const KvType type : kTypes)
      for (const int64_t head_dim : {2, 8, 30, 80, 256}) {
        const int64_t heads = 3, n = head_dim == 30 ? 150 : 40, position = 500, row = heads * head_dim;
        const size_t element = type == KvType::f32 ? 4 : type == KvType::f16 ? 2 : 1;
        const Floats keys = random(static_cast<size_t>(n * row), 4), values = random(static_cast<size_t>(n * row), 5);
        KVStore store(heads, head_dim, 300, type, vector_kernels(isa).attention);
        KVStore scalar(heads, head_dim, 300, type, vector_kernels(Isa::scalar).attention);
        store.write(pool, position, n, keys.data(), values.data());
        scalar.write(pool, position, n, keys.data(), values.data());
        for (const bool side : {false, true}) {
          std::vector<char> raw(static_cast<size_t>(n * row) * element), again(raw.size()), other(raw.size());
          Floats scales(static_cast<size_t>(n * heads)), scales_again(scales.size()), other_scales(scales.size());
          store.read_raw(position, n, side, raw.data(), scales.data());
          scalar.read_raw(position, n, side, other.data(), other_scales.data());
          CHECK(raw == other && scales == other_scales);
          KVStore copy(heads, head_dim, 1000, type, vector_kernels(isa).attention);
          copy.write_raw(position, n, side, raw.data(), scales.data());
          copy.read_raw(position, n, side, again.data(), scales_again.data());
          CHECK(raw == again && scales == scales_again);
          const Floats& written = side ? values : keys;
          if (type == KvType::f32) CHECK(std::memcmp(raw.data(), written.data(), raw.size()) == 0);
        }
      }
}

// What a slot held before, and scales of slots never seen, must not leak into a result.
static void unseen_damage_stays_unseen() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  ThreadPool pool(2);
  for (const Isa isa : usable_isas())
    for (const KvType type : kTypes) {
      const AttentionKernels& kernels = vector_kernels(isa).attention;
      KVStore clean(1, 64, 300, type, kernels), damaged(1, 64, 300, type, kernels);
      const Floats bad(static_cast<size_t>(clean.slots() * 64), nan), x = random(300 * 64, 6), q = random(2 * 64, 7);
      damaged.write(pool, 0, clean.slots(), bad.data(), bad.data());
      clean.write(pool, 600, 300, x.data(), x.data());
      damaged.write(pool, 600, 300, x.data(), x.data());
      Floats a(2 * 64), b(2 * 64);
      const Spans spans = Spans::causal(1, 900, 290);
      attend(clean, pool, q.data(), spans, 2, 1.0f, 50.0f, a.data());
      attend(damaged, pool, q.data(), spans, 2, 1.0f, 50.0f, b.data());
      CHECK(same_bits(a, b));
      damaged.write(pool, 899, 1, bad.data(), bad.data());  // and this one is seen
      attend(damaged, pool, q.data(), spans, 2, 1.0f, 50.0f, b.data());
      for (const float v : b) CHECK(std::isnan(v));
    }
}

static float ulps(float got, double exact) {
  const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
  return static_cast<float>(std::fabs(got - exact) / ulp);
}

static void exp_and_tanh_are_accurate() {
  for (const Isa isa : usable_isas()) {
    const VectorKernels& kernels = vector_kernels(isa);
    float worst_exp = 0, worst_tanh = 0;
    const uint32_t step = isa == Isa::scalar ? 199999 : 19999;
    for (uint32_t bits = 0x30000000; bits < 0x7F800000; bits += step) {
      float x;
      std::memcpy(&x, &bits, sizeof x);
      Floats total(16, 0.0f), one(16, 1.0f);
      float max = 0.0f, sum = 0.0f;  // merging a split whose largest score is −x: total = exp(−x)
      kernels.attention.merge(total.data(), &max, &sum, one.data(), 1.0f, -x, 1.0f, 16);
      if (x < 87.0f) worst_exp = std::max(worst_exp, ulps(total[0], std::exp(-static_cast<double>(x))));
      else if (x > 87.0f) CHECK(total[0] == 0.0f);
      float t[2] = {x, -x};
      kernels.elementwise.softcap(t, 1.0f, 2);
      CHECK(t[0] == -t[1]);
      worst_tanh = std::max(worst_tanh, ulps(t[0], std::tanh(static_cast<double>(x))));
      if (x > 8.1f) CHECK(t[0] == 1.0f);
    }
    std::printf("%s: exp %.2f ulp, tanh %.2f ulp\n", name(isa), worst_exp, worst_tanh);
    CHECK(worst_exp <= 1.1f && worst_tanh <= 5.2f);
  }
}

static void elementwise_kernels_agree() {
  const ElementwiseKernels& scalar = vector_kernels(Isa::scalar).elementwise;
  for (const Isa isa : usable_isas()) {
    const ElementwiseKernels& k = vector_kernels(isa).elementwise;
    for (int64_t n = 1; n <= 200; n = n < 70 ? n + 1 : n + 13) {
      const size_t size = static_cast<size_t>(n);
      const Floats x = random(size + 1, 8, 3.0f), h = random(size, 9), w = random(size, 10), v = random(size, 11);
      Floats a(size), b(size), c(size), d(size);
      k.rms_norm(x.data() + 1, w.data(), 1e-6f, n, a.data());
      scalar.rms_norm(x.data() + 1, w.data(), 1e-6f, n, b.data());
      CHECK(same_bits(a, b));
      for (const float* post : {w.data(), static_cast<const float*>(nullptr)}) {
        k.add_norm(x.data() + 1, h.data(), post, v.data(), 1e-6f, n, a.data(), b.data());
        scalar.add_norm(x.data() + 1, h.data(), post, v.data(), 1e-6f, n, c.data(), d.data());
        CHECK(same_bits(a, c) && same_bits(b, d));
      }
      k.layer_norm(x.data() + 1, w.data(), v.data(), 1e-6f, n, a.data());
      scalar.layer_norm(x.data() + 1, w.data(), v.data(), 1e-6f, n, b.data());
      CHECK(same_bits(a, b));
      k.geglu(x.data() + 1, h.data(), n, a.data());
      scalar.geglu(x.data() + 1, h.data(), n, b.data());
      CHECK(same_bits(a, b));
      Floats p = x, q = x;
      k.bias_gelu(p.data() + 1, h.data(), n);
      scalar.bias_gelu(q.data() + 1, h.data(), n);
      CHECK(same_bits(p, q));
      k.softcap(p.data() + 1, 2.0f, n);
      scalar.softcap(q.data() + 1, 2.0f, n);
      CHECK(same_bits(p, q));
      if (n % 2 == 0) {
        k.rope(p.data() + 1, h.data(), w.data(), n / 2);
        scalar.rope(q.data() + 1, h.data(), w.data(), n / 2);
        CHECK(same_bits(p, q));
      }
    }
  }
}

static float from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  float x = static_cast<float>(exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
  if (exponent == 31) x = mantissa ? NAN : HUGE_VALF;
  return half & 0x8000 ? -x : x;
}

// Read by attention to one position, whose values come out as they are.
static void every_float16() {
  ThreadPool pool(1);
  for (const Isa isa : usable_isas()) {
    const AttentionKernels& k = vector_kernels(isa).attention;
    std::vector<uint16_t> halves(1 << 16), back(256);
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
    KVStore store(1, 256, 256, KvType::f16, k);
    store.write_raw(0, 256, true, halves.data(), nullptr);
    for (int64_t p = 0; p < 256; ++p) {
      const Floats query(256, 0.0f);
      Floats x(256);
      attend(store, pool, query.data(), {{p}, {p + 1}}, 1, 1.0f, 0.0f, x.data());
      k.to_half(x.data(), 256, back.data());
      for (size_t i = 0; i < 256; ++i) {
        const uint16_t half = halves[static_cast<size_t>(p) * 256 + i];
        const float expected = from_half(half);
        CHECK(x[i] == expected || (std::isnan(x[i]) && std::isnan(expected)));
        CHECK(back[i] == half || std::isnan(expected) || half == 0x8000);
      }
    }
    for (uint64_t bits = 1; bits >> 32 == 0; bits += 9999) {  // between them: rounded as the scalar one does
      const auto low = static_cast<uint32_t>(bits);
      float f;
      std::memcpy(&f, &low, sizeof f);
      uint16_t a, b;
      k.to_half(&f, 1, &a);
      vector_kernels(Isa::scalar).attention.to_half(&f, 1, &b);
      CHECK(a == b);
    }
  }
}

static void pools_do_not_change_a_bit() {
  const Floats x = random(40 * 300, 12), w = random(300, 13);
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < 40; ++i) positions.push_back(i * i);
  Floats expected[4], got[4];
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    for (Floats& y : got) y.assign(x.size(), 0.0f);
    rms_norm(x.data(), w.data(), 1e-6f, 40, 300, pool, got[0].data());
    add_norm(x.data(), got[0].data(), w.data(), w.data(), 1e-6f, 40, 300, pool, got[1].data(), got[2].data());
    rope(got[2].data(), 40, 5, 60, positions.data(), 10000.0, 8.0f, pool);
    softcap(got[1].data(), 0.5f, 40 * 300, pool);
    layer_norm(x.data(), w.data(), w.data(), 1e-6f, 40, 300, pool, got[3].data());
    bias_gelu(got[3].data(), w.data(), 40, 300, pool);
    for (int i = 0; i < 4; ++i) {
      if (threads == 1) expected[i] = got[i];
      CHECK(same_bits(got[i], expected[i]));
    }
  }
}

// With an argument, only what is shared between threads, and little of that: ThreadSanitizer is slow.
int main(int argc, char**) {
  const bool brief = argc > 1;
  if (!brief) {
    every_float16();
    exp_and_tanh_are_accurate();
    elementwise_kernels_agree();
    hadamard_is_its_matrix();
    stored_rows_come_back();
    sizes_are_announced();
    queries_do_not_see_their_neighbours();
    unseen_damage_stays_unseen();
  }
  pools_do_not_change_a_bit();
  isas_agree_in_any_pieces(brief);
  std::puts("ok");
}
