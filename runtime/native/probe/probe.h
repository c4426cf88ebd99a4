// What this machine can do at best, so that a speed can be given as a share of it.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"

namespace bezel {

constexpr int64_t kSmallestRead = 1 << 20;

// Bytes a second at which all threads read `bytes` bytes, once and plainly; at least kSmallestRead.
double read_bandwidth(ThreadPool& pool, const uint8_t* data, int64_t bytes);

// Integer operations a second, two a multiply-add, of the instruction that selected_isa()'s kernels multiply int8
// with; on all threads for about `seconds`, everything held in registers.
double int8_peak(ThreadPool& pool, double seconds);

// The same of float32.
double float_peak(ThreadPool& pool, double seconds);

}  // namespace bezel
