#include "gemv.h"

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace bezel {

// Enough to hide the cost of taking a chunk, and few enough that a slow core holds nobody up for long.
constexpr int64_t kChunkBytes = 32 * 1024;

void gemv_q8_0(const uint8_t* weights, int64_t rows, int64_t blocks, const float* x, ThreadPool& pool,
               float* y) {
  const Kernels& k = kernels();
  std::vector<int8_t> q(static_cast<size_t>(blocks * kBlock));
  std::vector<float> scales(static_cast<size_t>(blocks));
  k.quantize_q8(x, blocks, q.data(), scales.data());
  const int64_t row_bytes = blocks * kQ8_0Bytes;
  const int64_t grain = std::max<int64_t>(1, kChunkBytes / row_bytes);
  pool.parallel_for(rows, grain, [&](int64_t begin, int64_t end) noexcept {
    k.gemv_q8_0(weights + begin * row_bytes, end - begin, blocks, q.data(), scales.data(), y + begin);
  });
}

}  // namespace bezel
