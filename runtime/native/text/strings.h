// Many strings in one piece of memory: string i is text[ends[i − 1]] up to text[ends[i]].
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bezel {

struct StringsView {
  const uint8_t* text;
  const int64_t* ends;
  int64_t count;

  int64_t begin(int64_t i) const { return i ? ends[i - 1] : 0; }
  int64_t size(int64_t i) const { return ends[i] - begin(i); }
};

// The ends of `count` strings as GGUF writes them, each after its length in eight bytes; fewer where `data` ends first.
std::vector<int64_t> string_ends(const uint8_t* data, int64_t size, int64_t count);

// Their text, without the lengths.
void copy_strings(const uint8_t* data, const std::vector<int64_t>& ends, uint8_t* text) noexcept;

// A hash of each; other seeds give unlike ones.
void string_hashes(const StringsView& strings, uint64_t seed, uint64_t* hashes) noexcept;

// The pieces of a ModelProto of sentencepiece_model.proto: messages of text (1), score (2) and type (3).
std::string sentencepiece_pieces(const StringsView& texts, const float* scores, const int32_t* types);

}  // namespace bezel
