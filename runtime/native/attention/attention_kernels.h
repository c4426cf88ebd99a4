// The kernels of attention and of the caches, and how keys and values lie in memory for them.
#pragma once

#include <cstdint>

namespace bezel {

// Attention goes through the positions in splits that begin at multiples of kSplit, wherever the chunk, the window
// or the ring begins. A split is computed for itself, and the splits of a query are merged in their order. So a
// query's result depends on nothing but its own keys and values.
constexpr int64_t kSplit = 256;
constexpr int64_t kMaxHeadDim = 512;  // the largest for which no sum of products of integers below overflows
constexpr int kMaxTileRows = 48;      // queries times heads that go through a split together

enum class KvType { f32, f16, int8 };
constexpr int kKvTypes = 3;

// A cache is [slot / kSplit][kv_head] of keys, their scales, values, their scales: filled from front to back. Keys and
// values of a split are panels that a kernel reads from front to back. With g = group and W = panel:
//   keys:   [slot / W][dim / g][W slots][g dims]
//   values: [dim / W][slot / g][W dims][g slots], the last panel narrower where dim is no multiple of W
// head_dim is filled up with zeros to a multiple of 16. Int8 is stored plus 128, as the unsigned operand of a dot
// product.
//
// Int8 has one scale for a head, and a head of keys may have a few numbers far above all others. So where head_dim is a
// power of two, int8 keys, values and the queries for them are rotated by the Hadamard matrix, which spreads every number
// over the whole head, and the mixed values are rotated back. Of a rotated query and key the product is the same.
//
// Values are scale · code. Keys, which need it more, use the codes' whole range: they are scale · (code + offset), and
// the lowest eight bits of the scale, which it can do without, hold offset + 128.
struct KvLayout {
  int64_t panel;    // W: 16 or 64, what suits the instruction set
  int64_t group;    // g: 4 for int8, 1 for floats
  int64_t element;  // bytes
};

// One split of one KV head, for rows: (query, head) pairs that share this KV head.
struct SplitJob {
  const char *keys, *values;                // of the split
  const float *key_scales, *value_scales;   // int8: of the split's kSplit slots
  int64_t dim;                              // padded head_dim
  int64_t rows;                             // 1 … kMaxTileRows
  const int32_t *first, *last;              // row r sees first[r] ≤ i < last[r] of the split; none if equal
  const char* queries;                      // by pack_query
  const float* query_factors;               // score = factor · key scale · product
  const int32_t* query_bias;
  float cap;                                // 0: none
  float* scores;                            // scratch, rows × kSplit
  char* weights;                            // scratch, rows × kSplit · 2 bytes (int8)
  float* mixed;                             // out: rows × dim, Σ weight · value / weight_scale
  float *max, *sum, *weight_scale;          // out, a row each: the largest score, Σ exp(score − max)
};

struct KvKernels {
  KvLayout layout;
  int64_t operand;  // bytes of a packed query element

  // dim floats to the kernel's own operands.
  void (*pack_query)(const float* x, int64_t dim, float scale, char* packed, float* factor, int32_t* bias) noexcept;
  void (*attend_split)(const SplitJob& job) noexcept;
};

struct AttentionKernels {
  KvKernels kv[kKvTypes];  // by KvType

  // total ← total · exp(max − new) + mixed · mixed_scale · exp(mixed_max − new), new the larger; likewise the sum.
  void (*merge)(float* total, float* max, float* sum, const float* mixed, float mixed_scale, float mixed_max,
                float mixed_sum, int64_t dim) noexcept;
  void (*finish)(const float* total, float sum, int64_t n, float* out) noexcept;  // out = total / sum

  // x ← x · H / √n for n a power of two up to kMaxHeadDim, H the Hadamard matrix: its own inverse.
  void (*hadamard)(float* x, int64_t n) noexcept;
  // q = x / scale to the nearest, ties to even, with scale = max|x| / 127. A scale that is not finite stays so,
  // and the damage shows in whatever reads it.
  void (*quantize)(const float* x, int64_t n, int8_t* q, float* scale) noexcept;
  // q = x / scale − offset likewise, with scale = (max x − min x) / 254, and the offset in it.
  void (*quantize_key)(const float* x, int64_t n, int8_t* q, float* scale) noexcept;
  void (*to_half)(const float* x, int64_t n, uint16_t* y) noexcept;
};

}  // namespace bezel
