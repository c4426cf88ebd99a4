#include "text/strings.h"

#include <cstring>

namespace bezel {
namespace {

constexpr int64_t kLength = sizeof(uint64_t);

uint64_t little_endian(const uint8_t* p) noexcept {
  uint64_t x = 0;
  for (int i = 0; i < 8; ++i) x |= uint64_t{p[i]} << (8 * i);
  return x;
}

int varint(uint64_t x, char* out) noexcept {
  int n = 0;
  for (; x > 0x7F; x >>= 7) out[n++] = static_cast<char>(x | 0x80);
  out[n++] = static_cast<char>(x);
  return n;
}

}  // namespace

std::vector<int64_t> string_ends(const uint8_t* data, int64_t size, int64_t count) {
  std::vector<int64_t> ends;
  int64_t at = 0;
  for (int64_t i = 0; i < count && size - at >= kLength; ++i) {
    const uint64_t length = little_endian(data + at);
    if (length > static_cast<uint64_t>(size - at - kLength)) break;
    at += kLength + static_cast<int64_t>(length);
    ends.push_back(at - (i + 1) * kLength);
  }
  return ends;
}

void copy_strings(const uint8_t* data, const std::vector<int64_t>& ends, uint8_t* text) noexcept {
  int64_t begin = 0;
  for (const int64_t end : ends) {
    data += kLength;
    std::memcpy(text + begin, data, static_cast<size_t>(end - begin));
    data += end - begin;
    begin = end;
  }
}

void string_hashes(const StringsView& strings, uint64_t seed, uint64_t* hashes) noexcept {
  for (int64_t i = 0; i < strings.count; ++i) {
    uint64_t hash = seed;
    for (int64_t at = strings.begin(i); at < strings.ends[i]; ++at) {
      hash = (hash ^ strings.text[at]) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 29;
    }
    hashes[i] = hash;
  }
}

std::string sentencepiece_pieces(const StringsView& texts, const float* scores, const int32_t* types) {
  constexpr char kText = 1 << 3 | 2, kScore = 2 << 3 | 5, kType = 3 << 3, kPiece = 1 << 3 | 2;
  std::string out;
  for (int64_t i = 0; i < texts.count; ++i) {
    char fields[32];
    fields[0] = kText;
    const int head = 1 + varint(static_cast<uint64_t>(texts.size(i)), fields + 1);
    char tail[16] = {kScore};
    std::memcpy(tail + 1, scores + i, sizeof *scores);
    tail[5] = kType;
    const int end = 6 + varint(static_cast<uint32_t>(types[i]), tail + 6);
    char piece[16] = {kPiece};
    const int start = 1 + varint(static_cast<uint64_t>(head + texts.size(i) + end), piece + 1);
    out.append(piece, static_cast<size_t>(start)).append(fields, static_cast<size_t>(head));
    out.append(reinterpret_cast<const char*>(texts.text) + texts.begin(i), static_cast<size_t>(texts.size(i)));
    out.append(tail, static_cast<size_t>(end));
  }
  return out;
}

}  // namespace bezel
