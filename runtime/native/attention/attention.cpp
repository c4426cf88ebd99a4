#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace bezel {
namespace {

constexpr int64_t kFewRows = 12;

int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// Arrays in one piece of memory, each from a cache line on. `lay_out` takes them, twice: to measure, and for good.
class Arena {
 public:
  template <class F>
  explicit Arena(F&& lay_out) {
    lay_out(*this);
    memory_.reset(new char[used_ + 64]);
    base_ = (reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64;
    used_ = 0;
    lay_out(*this);
  }
  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return array;
  }

 private:
  std::unique_ptr<char[]> memory_;
  uintptr_t base_ = 0;
  size_t used_ = 0;
};

struct Problem {
  const KVStore& store;
  const KvKernels& kernels;
  const float* queries;
  int64_t n, heads;
  const int64_t *first, *last;  // of what each query sees
  float scale, cap;
  float* out;

  int64_t group() const { return heads / store.kv_heads(); }
};

// Some rows of one KV head: `count` (query, head) pairs from `begin` on, those of a query side by side.
struct Tile {
  int64_t kv_head, begin, count;

  int64_t query(const Problem& p, int64_t row) const { return (begin + row) / p.group(); }
  int64_t element(const Problem& p, int64_t row) const {
    return (query(p, row) * p.heads + kv_head * p.group() + (begin + row) % p.group()) * p.store.head_dim();
  }
  int64_t first_split(const Problem& p) const {
    return *std::min_element(p.first + query(p, 0), p.first + query(p, count - 1) + 1) / kSplit;
  }
  int64_t end_split(const Problem& p) const {
    return (*std::max_element(p.last + query(p, 0), p.last + query(p, count - 1) + 1) - 1) / kSplit + 1;
  }
};

// What a split gives for the rows of a tile.
struct Partial {
  float *mixed, *max, *sum, *scale;

  void lay_out(Arena& arena, int64_t rows, int64_t dim) {
    mixed = arena.take<float>(rows * dim);
    max = arena.take<float>(rows);
    sum = arena.take<float>(rows);
    scale = arena.take<float>(rows);
  }
};

// The queries of a tile as the kernels take them.
struct Operands {
  char* queries;
  float* factors;
  int32_t* bias;

  void lay_out(Arena& arena, int64_t rows, int64_t dim) {
    queries = arena.take<char>(rows * dim * int64_t{sizeof(float)});
    factors = arena.take<float>(rows);
    bias = arena.take<int32_t>(rows);
  }
};

// What a thread needs while it works on a tile.
struct Scratch {
  std::atomic<bool> taken{false};
  char* weights;
  float *scores, *total;
  int32_t *first, *last;
  float *max, *sum;
  Operands operands;
  Partial partial;

  void lay_out(Arena& arena, int64_t rows, int64_t dim) {
    weights = arena.take<char>(rows * kSplit * 2);
    scores = arena.take<float>(rows * kSplit);
    total = arena.take<float>(rows * dim);
    first = arena.take<int32_t>(rows);
    last = arena.take<int32_t>(rows);
    max = arena.take<float>(rows);
    sum = arena.take<float>(rows);
    operands.lay_out(arena, rows, dim);
    partial.lay_out(arena, rows, dim);
  }
};

class Scratches {
 public:
  Scratches(int64_t count, int64_t rows, int64_t dim)
      : all_(static_cast<size_t>(count)), arena_([&](Arena& arena) {
          for (Scratch& scratch : all_) scratch.lay_out(arena, rows, dim);
        }) {}
  // There is one for every thread that can be at work.
  Scratch& take() noexcept {
    for (;;)
      for (Scratch& scratch : all_)
        if (!scratch.taken.exchange(true, std::memory_order_acquire)) return scratch;
  }
  static void give_back(Scratch& scratch) noexcept { scratch.taken.store(false, std::memory_order_release); }

 private:
  std::vector<Scratch> all_;
  Arena arena_;
};

void pack(const Problem& p, const Tile& tile, const Operands& operands) noexcept {
  const int64_t dim = p.store.dim(), head_dim = p.store.head_dim();
  for (int64_t r = 0; r < tile.count; ++r) {
    alignas(64) float query[kMaxHeadDim];
    std::memcpy(query, p.queries + tile.element(p, r), static_cast<size_t>(head_dim) * sizeof *query);
    std::memset(query + head_dim, 0, static_cast<size_t>(dim - head_dim) * sizeof *query);
    if (p.store.rotated()) p.store.kernels().hadamard(query, head_dim);
    p.kernels.pack_query(query, dim, p.scale, operands.queries + r * dim * p.kernels.operand, operands.factors + r,
                         operands.bias + r);
  }
}

void attend_split(const Problem& p, const Tile& tile, int64_t split, const Operands& operands, const Scratch& s,
                  const Partial& partial) noexcept {
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t query = tile.query(p, r), start = split * kSplit;
    s.first[r] = static_cast<int32_t>(std::clamp<int64_t>(p.first[query] - start, 0, kSplit));
    s.last[r] = static_cast<int32_t>(std::clamp<int64_t>(p.last[query] - start, s.first[r], kSplit));
  }
  const int64_t slot = split * kSplit % p.store.slots();
  SplitJob job{};
  job.keys = p.store.rows(false, tile.kv_head, slot);
  job.values = p.store.rows(true, tile.kv_head, slot);
  job.key_scales = p.store.scale(false, tile.kv_head, slot);
  job.value_scales = p.store.scale(true, tile.kv_head, slot);
  job.dim = p.store.dim();
  job.rows = tile.count;
  job.first = s.first;
  job.last = s.last;
  job.queries = operands.queries;
  job.query_factors = operands.factors;
  job.query_bias = operands.bias;
  job.cap = p.cap;
  job.scores = s.scores;
  job.weights = s.weights;
  job.mixed = partial.mixed;
  job.max = partial.max;
  job.sum = partial.sum;
  job.weight_scale = partial.scale;
  p.kernels.attend_split(job);
}

void begin(const Problem& p, const Tile& tile, Scratch& s) noexcept {
  std::memset(s.total, 0, static_cast<size_t>(tile.count * p.store.dim()) * sizeof(float));
  for (int64_t r = 0; r < tile.count; ++r) {
    s.max[r] = -HUGE_VALF;
    s.sum[r] = 0;
  }
}

void merge(const Problem& p, const Tile& tile, int64_t split, const Partial& partial, Scratch& s) noexcept {
  const int64_t dim = p.store.dim();
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t query = tile.query(p, r);
    if (p.last[query] <= split * kSplit || p.first[query] >= (split + 1) * kSplit) continue;  // sees nothing of it
    p.store.kernels().merge(s.total + r * dim, s.max + r, s.sum + r, partial.mixed + r * dim, partial.scale[r],
                            partial.max[r], partial.sum[r], dim);
  }
}

void finish(const Problem& p, const Tile& tile, Scratch& s) noexcept {
  for (int64_t r = 0; r < tile.count; ++r) {
    float* const total = s.total + r * p.store.dim();
    if (p.store.rotated()) p.store.kernels().hadamard(total, p.store.head_dim());
    p.store.kernels().finish(total, s.sum[r], p.store.head_dim(), p.out + tile.element(p, r));
  }
}

// Enough tiles for every thread: each is a task, and goes through its splits in order.
void by_tile(const Problem& p, const std::vector<Tile>& tiles, ThreadPool& pool) {
  Scratches scratches(pool.threads(), tiles[0].count, p.store.dim());
  pool.parallel_for(static_cast<int64_t>(tiles.size()), 1, [&](int64_t i, int64_t) noexcept {
    // The last queries of a chunk mostly see the most: first, so that no thread ends with a long one.
    const Tile& tile = tiles[tiles.size() - 1 - static_cast<size_t>(i)];
    Scratch& s = scratches.take();
    pack(p, tile, s.operands);
    begin(p, tile, s);
    for (int64_t split = tile.first_split(p); split < tile.end_split(p); ++split) {
      attend_split(p, tile, split, s.operands, s, s.partial);
      merge(p, tile, split, s.partial, s);
    }
    finish(p, tile, s);
    Scratches::give_back(s);
  });
}

// Few tiles: each split of a tile is a task, and whoever does a tile's last one merges them all, in order.
void by_split(const Problem& p, const std::vector<Tile>& tiles, ThreadPool& pool) {
  struct Task {
    size_t tile;
    int64_t split;
    Partial partial;
  };
  std::vector<Task> tasks;
  std::vector<std::atomic<int64_t>> left(tiles.size());
  for (size_t t = 0; t < tiles.size(); ++t) {
    const int64_t from = tiles[t].first_split(p), to = tiles[t].end_split(p);
    left[t].store(to - from, std::memory_order_relaxed);
    for (int64_t split = from; split < to; ++split) tasks.push_back({t, split, {}});
  }
  // In the order of the cache's memory.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.split < b.split; });
  std::vector<Operands> operands(tiles.size());
  const Arena arena([&](Arena& a) {
    for (size_t t = 0; t < tiles.size(); ++t) operands[t].lay_out(a, tiles[t].count, p.store.dim());
    for (Task& task : tasks) task.partial.lay_out(a, tiles[task.tile].count, p.store.dim());
  });
  const auto tile_count = static_cast<int64_t>(tiles.size());
  pool.parallel_for(tile_count, kMaxTileRows / tiles[0].count, [&](int64_t from, int64_t to) noexcept {
    for (int64_t t = from; t < to; ++t) pack(p, tiles[static_cast<size_t>(t)], operands[static_cast<size_t>(t)]);
  });
  Scratches scratches(pool.threads(), tiles[0].count, p.store.dim());
  pool.parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t i, int64_t) noexcept {
    const Task& task = tasks[static_cast<size_t>(i)];
    const Tile& tile = tiles[task.tile];
    Scratch& s = scratches.take();
    attend_split(p, tile, task.split, operands[task.tile], s, task.partial);
    if (left[task.tile].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      begin(p, tile, s);
      for (const Task& done : tasks)
        if (done.tile == task.tile) merge(p, tile, done.split, done.partial, s);
      finish(p, tile, s);
    }
    Scratches::give_back(s);
  });
}

}  // namespace

void attend(const KVStore& store, ThreadPool& pool, const float* queries, int64_t n, int64_t heads,
            const int64_t* first, const int64_t* last, float scale, float cap, float* out) {
  if (n == 0) return;
  const Problem p{store, store.kernels().kv[static_cast<int>(store.type())], queries, n, heads, first, last, scale, cap,
                  out};
  const int64_t rows = n * p.group();
  const int64_t wanted = 4 * pool.threads();  // tasks, so that threads of different speeds end together
  int64_t tile_rows = kMaxTileRows;
  while (tile_rows > kFewRows && store.kv_heads() * divide_up(rows, tile_rows) < wanted) tile_rows -= kFewRows;
  tile_rows = std::min(tile_rows, rows);

  std::vector<Tile> tiles;
  for (int64_t begin = 0; begin < rows; begin += tile_rows)
    for (int64_t h = 0; h < store.kv_heads(); ++h) tiles.push_back({h, begin, std::min(tile_rows, rows - begin)});
  if (tile_rows > kFewRows && static_cast<int64_t>(tiles.size()) >= wanted) by_tile(p, tiles, pool);
  else by_split(p, tiles, pool);
}

}  // namespace bezel
