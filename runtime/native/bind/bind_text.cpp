// Strings in the Python module.
#include <nanobind/nanobind.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/bind_arrays.h"
#include "text/strings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bezel {
namespace {

nb::tuple split_strings(const Input& data, int64_t count) {
  const uint8_t* bytes = checked<uint8_t>(data, "data", {"n"});
  const std::vector<int64_t> found = string_ends(bytes, size(data, 0), count);
  Result text(nb::dtype<uint8_t>(), {found.empty() ? 0 : found.back()});
  Result ends(nb::dtype<int64_t>(), {static_cast<int64_t>(found.size())});
  copy_strings(bytes, found, reinterpret_cast<uint8_t*>(text.data()));
  if (!found.empty()) std::memcpy(ends.data(), found.data(), found.size() * sizeof found[0]);
  return nb::make_tuple(text.array(), ends.array());
}

StringsView strings(const Input& text, const Input& ends) {
  const StringsView view{checked<uint8_t>(text, "text", {"n"}), checked<int64_t>(ends, "ends", {"count"}),
                         size(ends, 0)};
  int64_t before = 0;
  for (int64_t i = 0; i < view.count; before = view.ends[i++])
    if (view.ends[i] < before || view.ends[i] > size(text, 0))
      throw std::invalid_argument("ends: found " + std::to_string(view.ends[i]) + " at " + std::to_string(i) +
                                  ", expected " + std::to_string(before) + " to " + std::to_string(size(text, 0)));
  return view;
}

Array string_hashes_py(const Input& text, const Input& ends, uint64_t seed) {
  const StringsView view = strings(text, ends);
  Result hashes(nb::dtype<uint64_t>(), {view.count});
  string_hashes(view, seed, reinterpret_cast<uint64_t*>(hashes.data()));
  return hashes.array();
}

nb::bytes sentencepiece_pieces_py(const Input& text, const Input& ends, const Input& scores, const Input& types) {
  const StringsView view = strings(text, ends);
  const std::string pieces = sentencepiece_pieces(view, checked<float>(scores, "scores", {view.count}),
                                                  checked<int32_t>(types, "types", {view.count}));
  return nb::bytes(pieces.data(), pieces.size());
}

}  // namespace

void bind_text(nb::module_& m) {
  m.def("split_strings", &split_strings, "data"_a.noconvert(), "count"_a);
  m.def("string_hashes", &string_hashes_py, "text"_a.noconvert(), "ends"_a.noconvert(), "seed"_a);
  m.def("sentencepiece_pieces", &sentencepiece_pieces_py, "text"_a.noconvert(), "ends"_a.noconvert(),
        "scores"_a.noconvert(), "types"_a.noconvert());
}

}  // namespace bezel
