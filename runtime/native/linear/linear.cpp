#include "linear/linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "linear/linear_inputs.h"
#include "linear/linear_kernels.h"
#include "simd/vector_kernels.h"

namespace bezel {
namespace {

// For many tokens: the rows of a work item pass by the activations of a block of tokens, kPanelCols columns
// at a time, which stay in the core's second-level cache together with the sums.
constexpr int64_t kTokenBlock = 512;
constexpr int64_t kItemGroups = 8;
constexpr int64_t kItemsPerThread = 8;  // at least, where a matrix has the rows: the last ones leave threads idle

// For few: bytes of weights in a work item (see Item), not a power of two, because rows that begin a multiple of
// 4 KiB apart are in each other's way in a cache; and how far ahead weights are fetched.
constexpr int64_t kItemBytes = 276 * 1024;
constexpr int64_t kAheadBytes = 24 * 1024;

using Geglu = decltype(ElementwiseKernels::geglu);

// What is computed with what: a matrix, or the gate and the matrix that it gates.
struct Work {
  const Matrix* w;
  const Matrix* gated;  // null where there is no gate
  float* y;             // (n, rows); not used with a gate
};

// How some work is cut into items: `row_cuts` of `rows` rows, for every block of tokens; from number `first` on.
struct Cut {
  Work work;
  int64_t rows, row_cuts, first;
};

// Some rows of a matrix times some tiles of tokens. For few tokens, row r of group g of the item is its row
// r · groups + g: as many places of the file are read at once as a group has rows, far enough from each other
// that memory serves them in parallel, and each is read on and on.
struct Item {
  const Work* work;
  int64_t row, rows, tile, tiles;

  const uint8_t* first(const Matrix& w) const { return w.data + row * w.row_bytes; }
};

void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

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
  // With a gate, gelu(gate) · gated goes into `out`, which is then to be closed.
  Linear(const Inputs& inputs, const std::vector<Work>& works, int threads, Inputs* out = nullptr,
         Geglu geglu = nullptr);
  void run(ThreadPool& pool, Workspace& workspace);

 private:
  struct Memory {  // of a thread
    Scratch* scratch;
    float *acc, *rows;
    uint8_t* tail;
  };

  Item item(int64_t i) const;
  void work(const Memory& memory) noexcept;
  void compute(const Item& item, const Item& next, const Memory& memory) const noexcept;
  void multiply(const Matrix& w, const Item& item, const uint8_t* next, float* acc,
                const Memory& memory) const noexcept;
  void multiply(const Matrix& w, const Item& item, const Group& group, int64_t col, int64_t cols, Fetch fetch,
                Scratch& scratch, float* acc) const noexcept;
  void collect(const Item& item, const float* acc, float* to) const noexcept;

  int64_t groups(const Item& item) const { return (item.rows + k_.rows - 1) / k_.rows; }
  int64_t group_sums(const Item& item) const { return item.tiles * k_.tokens * k_.rows; }

  const LinearKernels& k_;
  const Inputs& x_;
  Inputs* const out_;
  const Geglu geglu_;
  const bool few_;
  std::vector<Cut> cuts_;
  int64_t items_ = 0, tile_block_, acc_size_ = 0, rows_size_ = 0, tail_size_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> threads_{0};
};

Linear::Linear(const Inputs& inputs, const std::vector<Work>& works, int threads, Inputs* out, Geglu geglu)
    : k_(inputs.k), x_(inputs), out_(out), geglu_(geglu), few_(inputs.n <= kMaxTokens) {
  const int64_t tiles = x_.tiles(), most = std::max<int64_t>(1, kTokenBlock / k_.tokens);
  const int64_t tile_cuts = (tiles + most - 1) / most;
  tile_block_ = (tiles + tile_cuts - 1) / tile_cuts;
  for (const Work& work : works) {
    const int64_t rows = work.w->rows, groups = (rows + k_.rows - 1) / k_.rows;
    const int64_t row_bytes = std::max(work.w->row_bytes, work.gated ? work.gated->row_bytes : 0);
    // What is gated is quantized by whole blocks.
    const int64_t unit = work.gated ? std::max(1, kXBlock / k_.rows) : 1;
    int64_t together = few_ ? kItemBytes / (k_.rows * row_bytes) : kItemGroups;
    together = std::min(together, groups * tile_cuts / (kItemsPerThread * threads)) / unit * unit;
    together = std::max(unit, together);
    const int64_t row_cuts = (groups + together - 1) / together;
    cuts_.push_back({work, together * k_.rows, row_cuts, items_});
    items_ += row_cuts * tile_cuts;
    acc_size_ = std::max(acc_size_, together * k_.rows * tile_block_ * k_.tokens * (work.gated ? 2 : 1));
    if (work.gated) rows_size_ = std::max(rows_size_, 2 * together * k_.rows);
    if (rows % k_.rows != 0) tail_size_ = std::max(tail_size_, k_.rows * row_bytes);
  }
}

Item Linear::item(int64_t i) const {
  const Cut* cut = &cuts_.back();
  while (i < cut->first) --cut;
  i -= cut->first;
  const int64_t row = i % cut->row_cuts * cut->rows, tile = i / cut->row_cuts * tile_block_;
  return {&cut->work, row, std::min(cut->rows, cut->work.w->rows - row), tile,
          std::min(tile_block_, x_.tiles() - tile)};
}

void Linear::run(ThreadPool& pool, Workspace& workspace) {
  const int threads = pool.threads();
  Scratch* const scratch = workspace.get<Scratch>(Workspace::kScratch, threads);
  float* const acc = workspace.get<float>(Workspace::kAcc, acc_size_ * threads);
  float* const rows = workspace.get<float>(Workspace::kRows, rows_size_ * threads);
  uint8_t* const tail = workspace.get<uint8_t>(Workspace::kTail, tail_size_ * threads);
  pool.parallel_for(threads, 1, [&](int64_t, int64_t) noexcept {
    const int i = threads_.fetch_add(1, std::memory_order_relaxed);
    work({scratch + i, acc + acc_size_ * i, rows + rows_size_ * i, tail + tail_size_ * i});
  });
}

// An item is taken before the one before it is computed, so that its weights can be fetched into the cache.
void Linear::work(const Memory& memory) noexcept {
  int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
  if (i >= items_) return;
  for (Item now = item(i);;) {
    i = next_.fetch_add(1, std::memory_order_relaxed);
    const Item next = i < items_ ? item(i) : now;
    compute(now, next, memory);
    if (i >= items_) return;
    now = next;
  }
}

void Linear::compute(const Item& item, const Item& next, const Memory& memory) const noexcept {
  const Work& work = *item.work;
  const uint8_t* const after = next.first(*next.work->w);
  float *const acc = memory.acc, *const gated_acc = acc + groups(item) * group_sums(item);
  multiply(*work.w, item, work.gated ? item.first(*work.gated) : after, acc, memory);
  if (work.gated) multiply(*work.gated, item, after, gated_acc, memory);
  const int64_t first = item.tile * k_.tokens, last = std::min(x_.n, (item.tile + item.tiles) * k_.tokens);
  for (int64_t t = first; t < last; ++t) {
    const int64_t sums = (t - first) * k_.rows;
    if (!work.gated) {
      collect(item, acc + sums, work.y + t * work.w->rows + item.row);
      continue;
    }
    float *const gate = memory.rows, *const gated = gate + item.rows;
    collect(item, acc + sums, gate);
    collect(item, gated_acc + sums, gated);
    geglu_(gate, gated, item.rows, gate);
    out_->put(t, item.row, item.rows, gate);
  }
}

// The sums [group][token][row] of an item's rows of w. `next` is what this thread will read afterwards.
void Linear::multiply(const Matrix& w, const Item& item, const uint8_t* next, float* acc,
                      const Memory& memory) const noexcept {
  const Layout& format = *layout(w.type);
  const bool quantized = x_.bias_of(w) != nullptr;
  const int64_t row_bytes = w.row_bytes, full = item.rows / k_.rows, left = item.rows - full * k_.rows;
  const int64_t between_rows = few_ ? full * row_bytes : row_bytes,
                between_groups = few_ ? row_bytes : k_.rows * row_bytes;
  const uint8_t* const data = item.first(w);
  uint8_t* const tail = memory.tail;
  if (left > 0) {  // the kernels read whole groups
    std::memcpy(tail, data + full * k_.rows * row_bytes, static_cast<size_t>(left * row_bytes));
    std::memset(tail + left * row_bytes, 0, static_cast<size_t>((k_.rows - left) * row_bytes));
  }
  std::memset(acc, 0, sizeof(float) * static_cast<size_t>(groups(item) * group_sums(item)));

  // For few tokens a group of rows is read to its end before the next one; for many, all rows of the item
  // pass by the same columns of the activations.
  const int64_t step = !quantized ? kFloatPanelCols : x_.tiles() == 1 ? w.cols : kPanelCols;
  const int64_t steps = (w.cols + step - 1) / step, count = groups(item);
  const int64_t groups_ahead = std::max<int64_t>(1, kAheadBytes / (k_.rows * row_bytes));
  const auto place = [&](int64_t i) {
    return few_ ? std::pair(i / steps, i % steps) : std::pair(i % count, i / count);
  };
  for (int64_t i = 0; i < count * steps; ++i) {
    const auto [g, s] = place(i);
    const int64_t cols = std::min(step, w.cols - s * step);
    const int64_t offset = s * step / format.block * format.bytes, bytes = cols / format.block * format.bytes;
    const uint8_t* ahead = next;
    if (few_) {
      const int64_t after = g + groups_ahead - full;  // this item's groups
      ahead = (after < 0 ? data + (full + after) * row_bytes : next + after * row_bytes) + offset;
    } else if (const auto [next_g, next_s] = place(i + 1); next_g < full && next_s < steps) {
      ahead = data + next_g * between_groups + next_s * step / format.block * format.bytes;
    }
    Group group{data + g * between_groups + offset, between_rows, ahead};
    if (g == full) group = {tail + offset, row_bytes, ahead};
    Fetch fetch{ahead, between_rows, bytes, k_.rows, 0};
    if (few_) fetch.rows = 0;
    else group.ahead = group.data;
    multiply(w, item, group, s * step, cols, fetch, *memory.scratch, acc + g * group_sums(item));
  }
}

// Continues the sums [token][row] of a group by some columns.
void Linear::multiply(const Matrix& w, const Item& item, const Group& group, int64_t col, int64_t cols,
                      Fetch fetch, Scratch& scratch, float* acc) const noexcept {
  const Inputs::Bias* const bias = x_.bias_of(w);
  const QuantizedKernels& k = k_.of[w.type];
  if (bias == nullptr) {
    k_.dequantize[w.type](group, cols, scratch.floats);
    for (int64_t i = 0; i < item.tiles; ++i, acc += k_.tokens * k_.rows)
      k_.gemm_float(scratch.floats, cols, x_.floats_at(item.tile + i, col), x_.tokens(item.tile + i), acc);
  } else if (x_.tiles() == 1) {
    k.gemv(group, cols / kXBlock, x_.at(*bias, 0, 0), x_.tokens(0), acc);
  } else {
    k.unpack(group, cols / kXBlock, scratch.panel);
    for (int64_t i = 0; i < item.tiles; ++i, acc += k_.tokens * k_.rows) {
      fetch.share(i, item.tiles);
      k.gemm(scratch.panel, cols / kXBlock, x_.at(*bias, item.tile + i, col / kXBlock),
             x_.tokens(item.tile + i), acc);
    }
  }
}

// The sums [group][row] of a token, `acc` being the first group's, as rows of the matrix.
void Linear::collect(const Item& item, const float* acc, float* to) const noexcept {
  const int64_t full = item.rows / k_.rows, left = item.rows - full * k_.rows;
  for (int64_t g = 0; g < full; ++g, acc += group_sums(item)) {
    if (few_)
      for (int r = 0; r < k_.rows; ++r) to[r * full + g] = acc[r];
    else std::memcpy(to + g * k_.rows, acc, sizeof(float) * static_cast<size_t>(k_.rows));
  }
  if (left > 0) std::memcpy(to + full * k_.rows, acc, sizeof(float) * static_cast<size_t>(left));
}

const LinearKernels& linear_kernels(Isa isa) noexcept {
#define BEZEL_KERNELS(isa) linear_##isa,
  static constexpr decltype(&linear_scalar) of[] = {BEZEL_ISAS(BEZEL_KERNELS)};
#undef BEZEL_KERNELS
  return of[static_cast<int>(isa)]();
}

// Two, because the activations of a gate and those of what it feeds are there at the same time.
thread_local Workspace workspaces[2];

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

void linear(Isa isa, ThreadPool& pool, const float* x, int64_t n, const Matrix* const* w, int count,
            float* const* y, Activations activations) {
  if (n == 0 || count == 0) return;
  Workspace& memory = workspaces[0];
  Inputs inputs(memory, linear_kernels(isa), n, w[0]->cols, w, count, activations);
  inputs.fill(pool, x);
  std::vector<Work> works;
  for (int i = 0; i < count; ++i) works.push_back({w[i], nullptr, y[i]});
  Linear(inputs, works, pool.threads()).run(pool, memory);
}

void feed_forward(Isa isa, ThreadPool& pool, const float* x, int64_t n, const Matrix& gate, const Matrix& up,
                  const Matrix& down, float* y, Activations activations) {
  if (n == 0) return;
  const LinearKernels& kernels = linear_kernels(isa);
  const Matrix *const first[] = {&gate, &up}, *const second[] = {&down};
  Inputs inputs(workspaces[0], kernels, n, gate.cols, first, 2, activations);
  Inputs gated(workspaces[1], kernels, n, down.cols, second, 1, activations);
  inputs.fill(pool, x);
  Linear(inputs, {{&gate, &up, nullptr}}, pool.threads(), &gated, vector_kernels(isa).elementwise.geglu)
      .run(pool, workspaces[0]);
  gated.close(pool);
  Linear(gated, {{&down, nullptr, y}}, pool.threads()).run(pool, workspaces[1]);
}

void embed(const Matrix& w, const int64_t* ids, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i, out += w.cols) {
    dequantize_row(w.type, w.data + ids[i] * w.row_bytes, w.cols, out);
    for (int64_t c = 0; c < w.cols; ++c) out[c] *= scale;
  }
}

}  // namespace bezel
