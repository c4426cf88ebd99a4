// What the kernels of one instruction set offer to linear(): the table, and how weights and activations lie.
//
// A kernel file is compiled with the flags of its instruction set. All its helpers have internal linkage, and
// it calls no template or inline function of the standard library: the linker keeps one copy of those for the
// whole program, and it must not be the copy that only a new processor can run.
//
// FIXED ORDER. Every output is the same sequence of float32 operations in every kernel of every instruction
// set, so that its bits depend neither on how many tokens are computed together nor on the threads or the
// machine:
//
//     for the sub-blocks j of a row, in order: (32 weights that share a scale; 16 in Q2_K, Q3_K, Q6_K)
//       acc = fma(float(Σ (code − zero) · q), d_j · dx, acc)      the sum exact, in integers
//       acc = fma(m_j, dx · float(Σ q), acc)                      formats with a minimum only
//
// and with float32 activations, for the columns k in order: acc = fma(w_k, x_k, acc).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "linear/format_table.h"

namespace bezel {

constexpr int kXBlock = 32;           // activations that share a scale
constexpr int kPanelCols = 512;       // weights of a row that are unpacked at a time
constexpr int kFloatPanelCols = 256;  // the same, as float32
constexpr int kMaxRows = 16;          // of a group
constexpr int kMaxTokens = 16;        // of a tile

// Some columns of a group of rows, unpacked. What `codes` holds is between unpack and gemm of one instruction
// set.
struct Panel {
  alignas(64) uint8_t codes[kPanelCols * kMaxRows];
  alignas(64) float scales[kPanelCols / 16 * kMaxRows];  // d_j of each row of the group, for each sub-block
  alignas(64) float minima[kPanelCols / 16 * kMaxRows];  // m_j
};

// A tile of `tokens` tokens: block b of token t is the 32 bytes at q + (b · tokens + t) · 32, its scale is
// d[b · tokens + t]. A sub-block has the same place in `bias`: the int32 −zero · Σ q for formats with a zero
// point, the float32 dx · Σ q for those with a minimum.
struct Tile {
  const int8_t* q;
  const float* d;
  const void* bias;
};

// A group of `rows` rows at `data`, row_bytes apart. At `ahead` lie the bytes that will be wanted next, as
// many as the kernel reads of this group: they are fetched into the cache meanwhile. It may point anywhere.
struct Group {
  const uint8_t* data;
  int64_t row_bytes;
  const uint8_t* ahead;
};

// Pointers to kernels; `blocks` counts 32 columns.
struct QuantizedKernels {
  int zero;  // that the codes still contain: what `bias` makes good

  // All columns times the only tile of tokens, unpacked once, in registers: y[t · rows + r].
  void (*gemv)(const Group& w, int64_t blocks, const Tile& x, int tokens, float* y) noexcept;

  // At most kPanelCols columns, from the one at w.data on.
  void (*unpack)(const Group& w, int64_t blocks, Panel& panel) noexcept;

  // Continues acc[t · rows + r] by the columns of the panel. tokens is 1 … 4, 6, or a multiple of 4 up to the
  // tile, as in gemv.
  void (*gemm)(const Panel& panel, int64_t blocks, const Tile& x, int tokens, float* acc) noexcept;
};

struct LinearKernels {
  int rows;    // of a group
  int tokens;  // of a full tile

  // One token into a tile of `tokens`: scale = max|x| / 127 and q = x · (1 / scale) to nearest, ties to even.
  // A block whose scale would be subnormal becomes zero; one with an infinity or a NaN gets a NaN as its
  // scale, so that the damage shows in the result. sums[(2 b + h) · tokens] is Σ q over half h of block b.
  void (*quantize)(const float* x, int64_t blocks, int tokens, int8_t* q, float* d, int32_t* sums) noexcept;

  // Of a tile of more than one token, where there are several: q from the order of Tile to the one that gemm
  // wants, in place. May be null.
  void (*arrange)(int8_t* q, int64_t blocks, int tokens) noexcept;

  QuantizedKernels of[kTypes];

  // The first `cols` columns of a group, at most kFloatPanelCols, as float32 [column][row].
  void (*dequantize[kTypes])(const Group& w, int64_t cols, float* panel) noexcept;

  // Continues acc[t · rows + r] with x [column][token].
  void (*gemm_float)(const float* panel, int64_t cols, const float* x, int tokens, float* acc) noexcept;
};

// linear_scalar, linear_avx2, …
#define BEZEL_DECLARE(isa) const LinearKernels& linear_##isa() noexcept;
BEZEL_ISAS(BEZEL_DECLARE)
#undef BEZEL_DECLARE

// One row of any type as float32, for embeddings.
void dequantize_row(int type, const uint8_t* row, int64_t cols, float* out) noexcept;

}  // namespace bezel
