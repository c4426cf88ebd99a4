// What the probes run, for each instruction set: a file fills the loops below with its registers. The rules for
// kernel files hold (see linear_kernels.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace bezel {

// A chunk is read at several places at once: hardware prefetchers stop at the end of a page, and a mapped file has
// small ones. Measured with one thread: 10.9 GB/s of a mapped file with one stream, 13.6 with two, 15.3 with four.
constexpr int64_t kProbeChunk = 512 * 1024;
constexpr int kProbeStreams = 4;

// What a loop returns depends on all that it did, so that no compiler leaves anything out.
struct ProbeLoops {
  uint64_t (*read)(const uint8_t* data) noexcept;  // the sum of the 64-bit words of a chunk
  uint64_t (*int8)(int64_t rounds) noexcept;
  uint64_t (*floats)(int64_t rounds) noexcept;
  double int8_ops, float_ops;  // of a round; a multiplication and its addition are two
};

// probe_loops_scalar, probe_loops_avx2, …
#define BEZEL_DECLARE(isa) ProbeLoops probe_loops_##isa() noexcept;
BEZEL_ISAS(BEZEL_DECLARE)
#undef BEZEL_DECLARE

namespace {  // a copy for each file, compiled with its flags

// R names the registers and their instructions; `dot` does kDotOps operations and `fma` kFmaOps. There are kSums
// independent sums, because an instruction takes several cycles and each of several units begins one a cycle.
template <class R>
ProbeLoops probe_loops() noexcept;

template <class R>
uint64_t probe_read(const uint8_t* data) noexcept {
  constexpr int kWidth = static_cast<int>(sizeof(typename R::Ints));
  constexpr int64_t kStream = kProbeChunk / kProbeStreams;
  typename R::Ints sums[kProbeStreams];
  for (int s = 0; s < kProbeStreams; ++s) sums[s] = R::ints(0);
  for (int64_t i = 0; i < kStream; i += 64)
    for (int s = 0; s < kProbeStreams; ++s)
      for (int k = 0; k < 64; k += kWidth) sums[s] = R::add64(sums[s], R::load(data + s * kStream + i + k));
  for (int s = 1; s < kProbeStreams; ++s) sums[0] = R::add64(sums[0], sums[s]);
  return R::fold64(sums[0]);
}

// A sum is its own first factor: nothing stays the same from round to round that could be computed only once.
template <class R>
uint64_t probe_int8(int64_t rounds) noexcept {
  typename R::Ints sums[R::kSums];
  const typename R::Ints factor = R::ints(0x01FF02FE);
  for (int i = 0; i < R::kSums; ++i) sums[i] = R::ints(i + 1);
  for (; rounds > 0; --rounds)
    for (int i = 0; i < R::kSums; ++i) sums[i] = R::dot(sums[i], factor);
  for (int i = 1; i < R::kSums; ++i) sums[0] = R::add64(sums[0], sums[i]);
  return R::fold64(sums[0]);
}

template <class R>
uint64_t probe_floats(int64_t rounds) noexcept {
  typename R::Floats sums[R::kSums];
  const typename R::Floats factor = R::floats(0.5f), term = R::floats(0.25f);
  for (int i = 0; i < R::kSums; ++i) sums[i] = R::floats(static_cast<float>(i));
  for (; rounds > 0; --rounds)
    for (int i = 0; i < R::kSums; ++i) sums[i] = R::fma(sums[i], factor, term);
  for (int i = 1; i < R::kSums; ++i) sums[0] = R::fma(sums[0], factor, sums[i]);
  return R::bits(sums[0]);
}

template <class R>
ProbeLoops probe_loops() noexcept {
  return {probe_read<R>, probe_int8<R>, probe_floats<R>,
          R::kSums * double{R::kDotOps}, R::kSums * double{R::kFmaOps}};
}

}  // namespace
}  // namespace bezel
