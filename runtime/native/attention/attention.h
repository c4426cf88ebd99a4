// Attention of queries over a KVStore, on a pool of threads.
#pragma once

#include <cstdint>

#include "attention/kv_store.h"
#include "base/thread_pool.h"

namespace bezel {

// out (n, heads, head_dim) = attention of queries of the same shape: query i sees the positions first[i] ≤ p < last[i],
// one at least. `cap` 0 means none. All positions from the smallest first to the largest last must be in the store, and
// heads be a multiple of its kv_heads. A query's result is the same bits whatever the other queries, their number, the
// capacity and the number of threads. Throws std::bad_alloc.
void attend(const KVStore& store, ThreadPool& pool, const float* queries, int64_t n, int64_t heads,
            const int64_t* first, const int64_t* last, float scale, float cap, float* out);

}  // namespace bezel
