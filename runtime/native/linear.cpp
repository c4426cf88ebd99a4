#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "linear_kernels.h"

namespace bezel {
namespace {

// For many tokens: the rows of a work item pass by the activations of a block of tokens, kPanelCols columns
// at a time, which stay in the core's second-level cache together with the sums.
constexpr int64_t kTokenBlock = 512;
constexpr int64_t kItemGroups = 8;

// For few: bytes of weights in a work item. See Item.
constexpr int64_t kItemBytes = 256 * 1024;

struct Layout {
  const char* name;
  int block, bytes;
  int sub;  // weights that share a scale; 0 for float types
  bool minimum;
};

void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

const Layout* layout(int64_t type) {
  static const auto table = [] {
    std::vector<Layout> t(kTypes, Layout{});
    t[kF32] = {"f32", 1, 4, 0, false};
    t[kF16] = {"f16", 1, 2, 0, false};
    t[kBF16] = {"bf16", 1, 2, 0, false};
    t[kQ4_0] = {"q4_0", 32, 18, 32, false};
    t[kQ4_1] = {"q4_1", 32, 20, 32, true};
    t[kQ5_0] = {"q5_0", 32, 22, 32, false};
    t[kQ8_0] = {"q8_0", 32, 34, 32, false};
    t[kQ4_K] = {"q4_k", 256, 144, 32, true};
    t[kQ5_K] = {"q5_k", 256, 176, 32, true};
    t[kQ6_K] = {"q6_k", 256, 210, 16, false};
    t[kIQ4_NL] = {"iq4_nl", 32, 18, 32, false};
    t[kIQ4_XS] = {"iq4_xs", 256, 136, 32, false};
    return t;
  }();
  return type >= 0 && type < kTypes && table[static_cast<size_t>(type)].block > 0
             ? &table[static_cast<size_t>(type)]
             : nullptr;
}

// Memory that a calling thread keeps from call to call: giving megabytes back to the system and taking them
// again would cost as much as a small matrix. Uninitialised, and aligned to a cache line.
class Workspace {
 public:
  enum Slot {
    kQ,
    kScales,
    kSums,
    kFloats,
    kAcc,
    kTail,
    kScratch,
    kBias
  };  // kBias and as many after it as needed

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

thread_local Workspace workspace;

// Tiles have k.tokens tokens; the last one 1 … 4, or a multiple of 4, of which some may be padding.
int64_t padded(int64_t tokens) { return tokens <= 4 ? tokens : (tokens + 3) / 4 * 4; }

// The activations of a call in tiles, in the forms that its matrices need. Tile i begins where its first
// token would, since all tiles before it are full.
class Inputs {
 public:
  // How the sums of a type's activations enter: by a zero point, or by a minimum (zero = −1).
  struct Bias {
    int zero, sub;
    int32_t* ints;
    float* moments;
  };

  Inputs(ThreadPool& pool, const LinearKernels& kernels, const float* x, int64_t n, int64_t cols,
         const Matrix* const* w, int count, Activations activations);

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
  void quantize(const float* x, int64_t tile) const noexcept;
  void fold(const Bias& bias, int64_t tile) const noexcept;
  void transpose(const float* x, int64_t tile) const noexcept;

  const Activations mode_;
  std::vector<Bias> biases_;
  int8_t* q_ = nullptr;
  float *d_ = nullptr, *floats_ = nullptr;
  int32_t* sums_ = nullptr;
};

Inputs::Inputs(ThreadPool& pool, const LinearKernels& kernels, const float* x, int64_t tokens_,
               int64_t columns, const Matrix* const* w, int count, Activations activations)
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
      if (format.minimum)
        biases_.push_back({-1, format.sub, nullptr, workspace.get<float>(slot, room * blocks)});
      else
        biases_.push_back({k.of[w[i]->type].zero, format.sub,
                           workspace.get<int32_t>(slot, room * (cols / format.sub)), nullptr});
    }
  }
  pool.parallel_for(tiles(), 1, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (q_ != nullptr) quantize(x, tile);
      for (const Bias& bias : biases_) fold(bias, tile);
      if (floats_ != nullptr) transpose(x, tile);
    }
  });
}

const Inputs::Bias* Inputs::bias_of(const Matrix& w) const {
  const Layout& format = *layout(w.type);
  if (mode_ == Activations::f32) return nullptr;
  const int zero = format.minimum ? -1 : k.of[w.type].zero;
  for (const Bias& bias : biases_)
    if (bias.zero == zero && bias.sub == format.sub) return &bias;
  return nullptr;
}

void Inputs::quantize(const float* x, int64_t tile) const noexcept {
  const int64_t first = tile * k.tokens, blocks = cols / kXBlock;
  const int stride = tokens(tile), real = static_cast<int>(std::min<int64_t>(stride, n - first));
  int8_t* const q = q_ + first * cols;
  float* const d = d_ + first * blocks;
  int32_t* const sums = sums_ + 2 * first * blocks;
  for (int t = 0; t < real; ++t)
    k.quantize(x + (first + t) * cols, blocks, stride, q + t * kXBlock, d + t, sums + t);
  for (int t = real; t < stride; ++t)
    for (int64_t b = 0; b < blocks; ++b) {
      std::memset(q + (b * stride + t) * kXBlock, 0, kXBlock);
      d[b * stride + t] = 0.0f;
      sums[2 * b * stride + t] = sums[(2 * b + 1) * stride + t] = 0;
    }
}

void Inputs::fold(const Bias& bias, int64_t tile) const noexcept {
  const int64_t blocks = cols / kXBlock, stride = tokens(tile), first = tile * k.tokens * blocks;
  const int32_t* sums = sums_ + 2 * first;
  const float* d = d_ + first;
  if (bias.sub < kXBlock) {
    int32_t* const out = bias.ints + 2 * first;
    for (int64_t i = 0; i < 2 * blocks * stride; ++i) out[i] = -bias.zero * sums[i];
    return;
  }
  for (int64_t b = 0; b < blocks; ++b, sums += 2 * stride)
    for (int64_t t = 0; t < stride; ++t) {
      const int64_t i = b * stride + t;
      const int32_t sum = sums[t] + sums[stride + t];
      if (bias.moments != nullptr) bias.moments[first + i] = d[i] * static_cast<float>(sum);
      else bias.ints[first + i] = -bias.zero * sum;
    }
}

void Inputs::transpose(const float* x, int64_t tile) const noexcept {
  const int64_t first = tile * k.tokens;
  const int stride = tokens(tile);
  float* out = floats_ + first * cols;
  for (int64_t c = 0; c < cols; ++c)
    for (int t = 0; t < stride; ++t) *out++ = first + t < n ? x[(first + t) * cols + c] : 0.0f;
}

Tile Inputs::at(const Bias& bias, int64_t tile, int64_t block) const {
  const int64_t i = tile * k.tokens * (cols / kXBlock) + block * tokens(tile);
  return {q_ + i * kXBlock, d_ + i,
          bias.moments != nullptr ? static_cast<const void*>(bias.moments + i)
                                  : bias.ints + i * (kXBlock / bias.sub)};
}

// Some rows of a matrix times some tiles of tokens. For few tokens, row r of group g of the item is its row
// r · groups + g: as many places of the file are read at once as a group has rows, far enough from each other
// that memory serves them in parallel, and each is read on and on.
struct Item {
  const Matrix* w;
  const Inputs::Bias* bias;
  float* y;
  int64_t row, rows, tile, tiles;
};

// How a matrix is cut into items: `row_cuts` of `rows` rows, for every block of tokens; from number `first`
// on.
struct Cut {
  const Matrix* w;
  const Inputs::Bias* bias;
  float* y;
  int64_t rows, row_cuts, first;
};

// Columns of the rows that a thread will unpack next, to be fetched into its cache bit by bit.
struct Fetch {
  const uint8_t* data;
  int64_t row_bytes, bytes, rows, done;

  void share(int64_t i, int64_t shares) {
    for (; done * shares < (i + 1) * rows; ++done)
      for (int64_t at = 0; at < bytes; at += 64) prefetch(data + done * row_bytes + at);
  }
};

struct Scratch {  // of a thread
  Panel panel;
  alignas(64) float floats[kFloatPanelCols * kMaxRows];
};

class Linear {
 public:
  Linear(const Inputs& inputs, const Matrix* const* w, int count, float* const* y, int threads);
  void run(ThreadPool& pool);

 private:
  Item item(int64_t i) const;
  void work(Scratch& scratch, float* acc, uint8_t* tail) noexcept;
  void compute(const Item& item, const Item& next, Scratch& scratch, float* acc,
               uint8_t* tail) const noexcept;
  void multiply(const Item& item, const Group& group, int64_t col, int64_t cols, Fetch fetch,
                Scratch& scratch, float* acc) const noexcept;
  void write(const Item& item, const float* acc) const noexcept;

  const LinearKernels& k_;
  const Inputs& x_;
  const bool few_;
  std::vector<Cut> cuts_;
  int64_t items_ = 0, tile_block_, acc_size_ = 0, tail_size_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> threads_{0};
};

Linear::Linear(const Inputs& inputs, const Matrix* const* w, int count, float* const* y, int threads)
    : k_(inputs.k), x_(inputs), few_(inputs.n <= kMaxTokens) {
  const int64_t tiles = x_.tiles(), most = std::max<int64_t>(1, kTokenBlock / k_.tokens);
  const int64_t tile_cuts = (tiles + most - 1) / most;
  tile_block_ = (tiles + tile_cuts - 1) / tile_cuts;
  for (int i = 0; i < count; ++i) {
    const int64_t groups = (w[i]->rows + k_.rows - 1) / k_.rows;
    int64_t together = few_ ? kItemBytes / (k_.rows * w[i]->row_bytes) : kItemGroups;
    together = std::max<int64_t>(1, std::min(together, groups * tile_cuts / (4 * threads)));
    const int64_t row_cuts = (groups + together - 1) / together;
    cuts_.push_back({w[i], x_.bias_of(*w[i]), y[i], together * k_.rows, row_cuts, items_});
    items_ += row_cuts * tile_cuts;
    acc_size_ = std::max(acc_size_, together * k_.rows * tile_block_ * k_.tokens);
    if (w[i]->rows % k_.rows != 0) tail_size_ = std::max(tail_size_, k_.rows * w[i]->row_bytes);
  }
}

Item Linear::item(int64_t i) const {
  const Cut* cut = &cuts_.back();
  while (i < cut->first) --cut;
  i -= cut->first;
  const int64_t row = i % cut->row_cuts * cut->rows, tile = i / cut->row_cuts * tile_block_;
  return {cut->w,
          cut->bias,
          cut->y,
          row,
          std::min(cut->rows, cut->w->rows - row),
          tile,
          std::min(tile_block_, x_.tiles() - tile)};
}

void Linear::run(ThreadPool& pool) {
  const int threads = pool.threads();
  Scratch* const scratch = workspace.get<Scratch>(Workspace::kScratch, threads);
  float* const acc = workspace.get<float>(Workspace::kAcc, acc_size_ * threads);
  uint8_t* const tail = workspace.get<uint8_t>(Workspace::kTail, tail_size_ * threads);
  pool.parallel_for(threads, 1, [&](int64_t, int64_t) noexcept {
    const int thread = threads_.fetch_add(1, std::memory_order_relaxed);
    work(scratch[thread], acc + acc_size_ * thread, tail + tail_size_ * thread);
  });
}

// An item is taken before the one before it is computed, so that its weights can be fetched into the cache.
void Linear::work(Scratch& scratch, float* acc, uint8_t* tail) noexcept {
  int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
  if (i >= items_) return;
  for (Item now = item(i);;) {
    i = next_.fetch_add(1, std::memory_order_relaxed);
    const Item next = i < items_ ? item(i) : now;
    compute(now, next, scratch, acc, tail);
    if (i >= items_) return;
    now = next;
  }
}

void Linear::compute(const Item& item, const Item& next, Scratch& scratch, float* acc,
                     uint8_t* tail) const noexcept {
  const Matrix& w = *item.w;
  const Layout& format = *layout(w.type);
  const int64_t row_bytes = w.row_bytes, full = item.rows / k_.rows, left = item.rows - full * k_.rows;
  const int64_t groups = full + (left > 0), acc_group = item.tiles * k_.tokens * k_.rows;
  const int64_t between_rows = few_ ? full * row_bytes : row_bytes,
                between_groups = few_ ? row_bytes : k_.rows * row_bytes;
  const uint8_t* const data = w.data + item.row * row_bytes;
  if (left > 0) {  // the kernels read whole groups
    std::memcpy(tail, data + full * k_.rows * row_bytes, static_cast<size_t>(left * row_bytes));
    std::memset(tail + left * row_bytes, 0, static_cast<size_t>((k_.rows - left) * row_bytes));
  }
  std::memset(acc, 0, sizeof(float) * static_cast<size_t>(groups * acc_group));

  // For few tokens a group of rows is read to its end before the next one; for many, all rows of the item
  // pass by the same columns of the activations.
  const int64_t step = item.bias == nullptr ? kFloatPanelCols : x_.n == 1 ? w.cols : kPanelCols;
  const int64_t steps = (w.cols + step - 1) / step;
  const auto place = [&](int64_t i) {
    return few_ ? std::pair(i / steps, i % steps) : std::pair(i % groups, i / groups);
  };
  for (int64_t i = 0; i < groups * steps; ++i) {
    const auto [g, s] = place(i);
    const int64_t cols = std::min(step, w.cols - s * step);
    const int64_t offset = s * step / format.block * format.bytes, bytes = cols / format.block * format.bytes;
    const uint8_t* ahead = next.w->data + next.row * next.w->row_bytes + (few_ ? offset : 0);
    const auto [next_g, next_s] = place(few_ ? i + steps : i + 1);
    if (next_g < full && next_s < steps)
      ahead = data + next_g * between_groups + next_s * step / format.block * format.bytes;
    Group group{data + g * between_groups + offset, between_rows, ahead};
    if (g == full) group = {tail + offset, row_bytes, ahead};
    Fetch fetch{ahead, between_rows, bytes, k_.rows, 0};
    if (few_) fetch.rows = 0;
    else group.ahead = group.data;
    multiply(item, group, s * step, cols, fetch, scratch, acc + g * acc_group);
  }
  write(item, acc);
}

// Continues the sums [token][row] of a group by some columns.
void Linear::multiply(const Item& item, const Group& group, int64_t col, int64_t cols, Fetch fetch,
                      Scratch& scratch, float* acc) const noexcept {
  const int type = item.w->type;
  if (item.bias == nullptr) {
    k_.dequantize[type](group, cols, scratch.floats);
    for (int64_t i = 0; i < item.tiles; ++i, acc += k_.tokens * k_.rows)
      k_.gemm_float(scratch.floats, cols, x_.floats_at(item.tile + i, col), x_.tokens(item.tile + i), acc);
  } else if (x_.n == 1) {
    k_.of[type].gemv(group, cols / kXBlock, x_.at(*item.bias, 0, 0), acc);
  } else {
    k_.of[type].unpack(group, cols / kXBlock, scratch.panel);
    for (int64_t i = 0; i < item.tiles; ++i, acc += k_.tokens * k_.rows) {
      fetch.share(i, item.tiles);
      k_.of[type].gemm(scratch.panel, cols / kXBlock, x_.at(*item.bias, item.tile + i, col / kXBlock),
                       x_.tokens(item.tile + i), acc);
    }
  }
}

// The sums [group][token][row] to y.
void Linear::write(const Item& item, const float* acc) const noexcept {
  const int64_t first = item.tile * k_.tokens, last = std::min(x_.n, (item.tile + item.tiles) * k_.tokens);
  const int64_t full = item.rows / k_.rows, left = item.rows - full * k_.rows;
  const int64_t acc_group = item.tiles * k_.tokens * k_.rows;
  for (int64_t t = first; t < last; ++t, acc += k_.rows) {
    float* const to = item.y + t * item.w->rows + item.row;
    for (int64_t g = 0; g < full; ++g) {
      const float* const from = acc + g * acc_group;
      if (few_)
        for (int r = 0; r < k_.rows; ++r) to[r * full + g] = from[r];
      else std::memcpy(to + g * k_.rows, from, sizeof(float) * static_cast<size_t>(k_.rows));
    }
    if (left > 0)
      std::memcpy(to + full * k_.rows, acc + full * acc_group, sizeof(float) * static_cast<size_t>(left));
  }
}

}  // namespace

Matrix::Matrix(const uint8_t* data_, int64_t rows_, int64_t row_bytes_, int64_t type_, int64_t cols_)
    : data(data_), rows(rows_), cols(cols_), row_bytes(row_bytes_), type(static_cast<int>(type_)) {
  const Layout* const format = layout(type_);
  if (format == nullptr)
    throw std::invalid_argument("gguf_type: found " + std::to_string(type_) + ", which no kernel reads");
  if (cols <= 0 || cols % format->block != 0)
    throw std::invalid_argument("cols: found " + std::to_string(cols) + ", expected a positive multiple of " +
                                std::to_string(format->block) + ", the block of " + format->name);
  if (row_bytes % format->bytes != 0 || row_bytes / format->bytes != cols / format->block)
    throw std::invalid_argument("data: found rows of " + std::to_string(row_bytes) + " bytes, expected " +
                                std::to_string(cols / format->block) + " blocks of " +
                                std::to_string(format->bytes) + " bytes, " + std::to_string(cols) +
                                " weights in " + format->name);
}

const LinearKernels& linear_kernels(Isa isa) {
  static const auto make = [](void (*use)(LinearKernels&) noexcept) {
    LinearKernels k{};
    use(k);
    return k;
  };
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::avx2: {
      static const LinearKernels k = make(use_avx2);
      return k;
    }
    case Isa::avxvnni: {
      static const LinearKernels k = make(use_avxvnni);
      return k;
    }
    case Isa::avx512vnni: {
      static const LinearKernels k = make(use_avx512vnni);
      return k;
    }
#elif defined(__aarch64__) || defined(_M_ARM64)
    case Isa::neon: {
      static const LinearKernels k = make(use_neon);
      return k;
    }
    case Isa::neondot: {
      static const LinearKernels k = make(use_neondot);
      return k;
    }
    case Isa::neoni8mm: {
      static const LinearKernels k = make(use_neoni8mm);
      return k;
    }
#endif
    default: {
      static const LinearKernels k = make(use_scalar);
      return k;
    }
  }
}

void linear(ThreadPool& pool, const float* x, int64_t n, const Matrix* const* w, int count, float* const* y,
            Activations activations) {
  linear(linear_kernels(selected_isa()), pool, x, n, w, count, y, activations);
}

void linear(const LinearKernels& k, ThreadPool& pool, const float* x, int64_t n, const Matrix* const* w,
            int count, float* const* y, Activations activations) {
  if (n == 0 || count == 0) return;
  const Inputs inputs(pool, k, x, n, w[0]->cols, w, count, activations);
  Linear(inputs, w, count, y, pool.threads()).run(pool);
}

void embed(const Matrix& w, const int64_t* ids, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i, out += w.cols) {
    dequantize_row(w.type, w.data + ids[i] * w.row_bytes, w.cols, out);
    for (int64_t c = 0; c < w.cols; ++c) out[c] *= scale;
  }
}

}  // namespace bezel
