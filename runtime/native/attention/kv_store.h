// The keys and values of one layer in memory.
#pragma once

#include <cstdint>

#include "attention/attention_kernels.h"
#include "base/thread_pool.h"

namespace bezel {

// Zeroed memory of which only the pages that are touched take up room.
class Pages {
 public:
  explicit Pages(int64_t bytes);  // throws std::bad_alloc
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  char* data() const noexcept { return data_; }

 private:
  char* data_;
  int64_t bytes_;
};

// Slots for `capacity` positions or a few more, in the layout of the kernels; position p lives in slot p mod slots().
// It knows no length: the caller says which positions are there. Not to be written by two threads at once, nor
// read meanwhile.
class KVStore {
 public:
  // Throws std::invalid_argument for a size that the kernels cannot do, std::bad_alloc.
  KVStore(int64_t kv_heads, int64_t head_dim, int64_t capacity, KvType type, const AttentionKernels& kernels);

  // What nbytes() of such a store is once the positions 0 … positions − 1 have been written. Throws
  // std::invalid_argument.
  static int64_t bytes_for(int64_t kv_heads, int64_t head_dim, int64_t capacity, KvType type,
                           const AttentionKernels& kernels, int64_t positions);

  int64_t kv_heads() const noexcept { return sizes_.heads; }
  int64_t head_dim() const noexcept { return sizes_.head_dim; }
  int64_t capacity() const noexcept { return sizes_.capacity; }
  KvType type() const noexcept { return type_; }
  const AttentionKernels& kernels() const noexcept { return kernels_; }

  // Whether heads are rotated (attention_kernels.h) when they are written.
  bool rotated() const noexcept { return type_ == KvType::int8 && (head_dim() & (head_dim() - 1)) == 0; }

  int64_t slots() const noexcept { return sizes_.slots; }                    // a multiple of kSplit
  int64_t dim() const noexcept { return sizes_.dim; }                        // head_dim, up to a multiple of 16
  int64_t nbytes() const noexcept { return sizes_.filled_bytes(written_); }  // of the slots that have been written

  // The keys or the values of `kv_head` from `slot` on, which begins a panel; and the scale of a slot (int8).
  char* rows(bool values, int64_t kv_head, int64_t slot) const noexcept;
  float* scale(bool values, int64_t kv_head, int64_t slot) const noexcept;

  // float32 (n, kv_heads, head_dim) for the positions from `position` on. n ≤ capacity.
  void write(ThreadPool& pool, int64_t position, int64_t n, const float* keys, const float* values) noexcept;

  // As it is stored: rows (n, kv_heads, head_dim), and for int8 scales (n, kv_heads).
  void read_raw(int64_t position, int64_t n, bool values, void* rows, float* scales) const noexcept;
  void write_raw(int64_t position, int64_t n, bool values, const void* rows, const float* scales) noexcept;

 private:
  void write_row(bool values, int64_t kv_head, int64_t slot, const float* x) noexcept;

  struct Sizes {
    Sizes(int64_t kv_heads, int64_t head_dim, int64_t capacity, KvType type, const KvLayout& layout);
    int64_t filled_bytes(int64_t written) const noexcept;  // by so many slots

    int64_t heads, head_dim, capacity, slots, dim;
    int64_t rows_bytes, side_bytes;  // of the keys or values of a head in a split: the rows; and with their scales
  };

  template <class T, int64_t g>
  void copy(bool in, bool values, int64_t kv_head, int64_t slot, T* row) const noexcept;
  void copy(bool in, bool values, int64_t kv_head, int64_t slot, void* row) const noexcept;

  KvType type_;
  const AttentionKernels& kernels_;
  KvLayout layout_;
  Sizes sizes_;
  int64_t written_ = 0;  // the highest slot so far, plus one
  Pages pages_;
};

}  // namespace bezel
