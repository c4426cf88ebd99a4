#include "attention/kv_store.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#endif

namespace bezel {

#if defined(_WIN32)

Pages::Pages(int64_t bytes) : bytes_(bytes) {
  data_ = static_cast<char*>(
      VirtualAlloc(nullptr, static_cast<SIZE_T>(bytes), MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
  if (data_ == nullptr) throw std::bad_alloc();
}

Pages::~Pages() { VirtualFree(data_, 0, MEM_RELEASE); }

#else

#if !defined(MAP_NORESERVE)
#define MAP_NORESERVE 0
#endif

Pages::Pages(int64_t bytes) : bytes_(bytes) {
  void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // A cache is filled from front to back, so that large pages cost a few MB at most, and it is read a quarter faster.
  if (bytes >= 8 << 20) madvise(p, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  data_ = static_cast<char*>(p);
}

Pages::~Pages() { munmap(data_, static_cast<size_t>(bytes_)); }

#endif

namespace {

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t checked(int64_t x, int64_t most, const char* name) {
  if (x < 1 || x > most)
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(x) + ", expected 1 to " +
                                std::to_string(most));
  return x;
}

}  // namespace

KVStore::Sizes::Sizes(int64_t kv_heads, int64_t dim_of_head, int64_t positions, KvType type, const KvLayout& layout)
    : heads(checked(kv_heads, 1 << 16, "kv_heads")),
      head_dim(checked(dim_of_head, kMaxHeadDim, "head_dim")),
      capacity(checked(positions, int64_t{1} << 32, "capacity")),
      slots(round_up(capacity, kSplit)),
      dim(round_up(head_dim, 16)),
      rows_bytes(kSplit * dim * layout.element),
      side_bytes(rows_bytes + (type == KvType::int8 ? kSplit * int64_t{sizeof(float)} : 0)) {
  if (head_dim % 2 != 0)
    throw std::invalid_argument("head_dim is " + std::to_string(head_dim) + ", expected an even number");
}

int64_t KVStore::Sizes::filled_bytes(int64_t written) const noexcept {
  return round_up(std::min(written, slots), kSplit) / kSplit * heads * 2 * side_bytes;
}

KVStore::KVStore(int64_t kv_heads, int64_t head_dim, int64_t capacity, KvType type,
                 const AttentionKernels& kernels)
    : type_(type),
      kernels_(kernels),
      layout_(kernels.kv[static_cast<int>(type)].layout),
      sizes_(kv_heads, head_dim, capacity, type, layout_),
      pages_(sizes_.filled_bytes(sizes_.slots)) {}

int64_t KVStore::bytes_for(int64_t kv_heads, int64_t head_dim, int64_t capacity, KvType type,
                           const AttentionKernels& kernels, int64_t positions) {
  return Sizes(kv_heads, head_dim, capacity, type, kernels.kv[static_cast<int>(type)].layout).filled_bytes(positions);
}

char* KVStore::rows(bool values, int64_t kv_head, int64_t slot) const noexcept {
  const int64_t side = (slot / kSplit * sizes_.heads + kv_head) * 2 + (values ? 1 : 0);
  return pages_.data() + side * sizes_.side_bytes + slot % kSplit * sizes_.dim * layout_.element;
}

float* KVStore::scale(bool values, int64_t kv_head, int64_t slot) const noexcept {
  if (type_ != KvType::int8) return nullptr;
  char* split = rows(values, kv_head, slot / kSplit * kSplit);
  return reinterpret_cast<float*>(split + sizes_.rows_bytes) + slot % kSplit;
}

// Copies a row of one head between `row` and its place in the layout. `in` says which way.
template <class T, int64_t g>
void KVStore::copy(bool in, bool values, int64_t kv_head, int64_t slot, T* row) const noexcept {
  const auto move = [in](T* stored, T* x) {
    T& to = in ? *stored : *x;
    to = in ? *x : *stored;
    if constexpr (g > 1) to ^= 0x80;  // int8 is stored plus 128
  };
  const int64_t W = layout_.panel;
  if (values) {
    const int64_t i = slot % kSplit;
    T* at = reinterpret_cast<T*>(rows(true, kv_head, slot - i));
    for (int64_t d = 0; d < sizes_.head_dim; d += W) {
      const int64_t width = std::min(W, sizes_.dim - d), n = std::min(W, sizes_.head_dim - d);
      T* run = at + d * kSplit + i / g * width * g + i % g;
      for (int64_t e = 0; e < n; ++e) move(run + e * g, row + d + e);
    }
  } else {
    const int64_t i = slot % W;
    T* at = reinterpret_cast<T*>(rows(false, kv_head, slot - i)) + i * g;
    for (int64_t d = 0; d < sizes_.head_dim; d += g)
      for (int64_t e = d; e < std::min(d + g, sizes_.head_dim); ++e) move(at + d * W + e - d, row + e);
  }
}

void KVStore::copy(bool in, bool values, int64_t kv_head, int64_t slot, void* row) const noexcept {
  switch (type_) {
    case KvType::f32: return copy<float, 1>(in, values, kv_head, slot, static_cast<float*>(row));
    case KvType::f16: return copy<uint16_t, 1>(in, values, kv_head, slot, static_cast<uint16_t*>(row));
    case KvType::int8: return copy<uint8_t, 4>(in, values, kv_head, slot, static_cast<uint8_t*>(row));
  }
}

void KVStore::write(ThreadPool& pool, int64_t position, int64_t n, const float* keys, const float* values) noexcept {
  constexpr int64_t kRows = 64;  // of a task
  written_ = std::max(written_, std::min(position % sizes_.slots + n, sizes_.slots));
  const int64_t sides = 2 * sizes_.heads, groups = (n + kRows - 1) / kRows;
  // A few rows are not worth a second thread.
  pool.parallel_for(sides * groups, n < kRows ? sides : 1, [&](int64_t from, int64_t to) noexcept {
    for (int64_t task = from; task < to; ++task) {
      const bool side = task % 2;
      const int64_t head = task % sides / 2, begin = task / sides * kRows;
      for (int64_t i = begin; i < std::min(begin + kRows, n); ++i)
        write_row(side, head, (position + i) % sizes_.slots,
                  (side ? values : keys) + (i * sizes_.heads + head) * sizes_.head_dim);
    }
  });
}

void KVStore::write_row(bool values, int64_t kv_head, int64_t slot, const float* x) noexcept {
  alignas(64) char row[kMaxHeadDim * sizeof(float)];
  switch (type_) {
    case KvType::f32: std::memcpy(row, x, static_cast<size_t>(sizes_.head_dim) * sizeof *x); break;
    case KvType::f16: kernels_.to_half(x, sizes_.head_dim, reinterpret_cast<uint16_t*>(row)); break;
    case KvType::int8: {
      alignas(64) float turned[kMaxHeadDim];
      std::memcpy(turned, x, static_cast<size_t>(sizes_.head_dim) * sizeof *x);
      if (rotated()) kernels_.hadamard(turned, sizes_.head_dim);
      const auto quantize = values ? kernels_.quantize : kernels_.quantize_key;
      quantize(turned, sizes_.head_dim, reinterpret_cast<int8_t*>(row), scale(values, kv_head, slot));
      break;
    }
  }
  copy(true, values, kv_head, slot, row);
}

void KVStore::read_raw(int64_t position, int64_t n, bool values, void* rows, float* scales) const noexcept {
  char* row = static_cast<char*>(rows);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = (position + i) % sizes_.slots;
    for (int64_t h = 0; h < sizes_.heads; ++h, row += sizes_.head_dim * layout_.element) {
      copy(false, values, h, slot, row);
      if (type_ == KvType::int8) *scales++ = *scale(values, h, slot);
    }
  }
}

void KVStore::write_raw(int64_t position, int64_t n, bool values, const void* rows, const float* scales) noexcept {
  const char* row = static_cast<const char*>(rows);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = (position + i) % sizes_.slots;
    written_ = std::max(written_, slot + 1);
    for (int64_t h = 0; h < sizes_.heads; ++h, row += sizes_.head_dim * layout_.element) {
      copy(true, values, h, slot, const_cast<char*>(row));  // it is only read
      if (type_ == KvType::int8) *scale(values, h, slot) = *scales++;
    }
  }
}

}  // namespace bezel
