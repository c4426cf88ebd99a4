// Attention of the newest queries over a KVStore, on a pool of threads.
#pragma once

#include <cstdint>

#include "attention/kv_store.h"
#include "base/thread_pool.h"

namespace bezel {

// out (n, heads, head_dim) = attention of queries of the same shape, which belong to the n newest of `length`
// positions. A query at position p sees p − window + 1 … p, or 0 … p where window is 0. `cap` 0 means none. All
// that is visible must be in the store, and heads be a multiple of its kv_heads. A query's result is the same
// bits for every n, capacity and number of threads. Throws std::bad_alloc.
void attend(const KVStore& store, ThreadPool& pool, const float* queries, int64_t n, int64_t heads, int64_t length,
            int64_t window, float scale, float cap, float* out);

}  // namespace bezel
