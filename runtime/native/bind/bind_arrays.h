// Arrays from Python, checked, and new ones for it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace bezel {

using Input = nanobind::ndarray<nanobind::ro, nanobind::device::cpu>;  // weights come from a mapped file
using InOut = nanobind::ndarray<nanobind::device::cpu>;
using Array = nanobind::ndarray<nanobind::numpy>;
using DType = nanobind::dlpack::dtype;

// Of a dimension: a number, or the name of one that may be anything.
struct Size {
  int64_t number = -1;
  const char* name = nullptr;

  Size(int64_t n) : number(n) {}
  Size(const char* n) : name(n) {}
};

// Dimensions, which stand somewhere else: a list of them costs no memory of its own.
struct Shape {
  const Size* sizes;
  size_t size;

  Shape(std::initializer_list<Size> s) : sizes(s.begin()), size(s.size()) {}
  Shape(const std::vector<Size>& s) : sizes(s.data()), size(s.size()) {}
  const Size& operator[](size_t i) const { return sizes[i]; }
};

inline std::string text(const Shape& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size; ++i)
    s += (shape[i].name ? shape[i].name : std::to_string(shape[i].number)) + (i + 1 < shape.size ? ", " : "");
  return s + (shape.size == 1 ? ",)" : ")");
}

inline std::string text(DType type) {
  static const char* const kinds[] = {"int", "uint", "float"};
  return type.code < 3 ? kinds[type.code] + std::to_string(type.bits) : "another type";
}

template <class A>
int64_t size(const A& array, size_t axis) {
  return static_cast<int64_t>(array.shape(axis));
}

template <class A>
std::string describe(const A& array) {
  std::vector<Size> shape;
  for (size_t i = 0; i < array.ndim(); ++i) shape.emplace_back(size(array, i));
  return text(array.dtype()) + " " + text(Shape(shape));
}

// The data of a C-contiguous array of `type` and `shape`; throws std::invalid_argument for any other.
template <class A>
auto* checked(const A& array, const char* name, DType type, const Shape& shape) {
  bool fits = array.dtype() == type && array.ndim() == shape.size;
  for (size_t i = 0; fits && i < shape.size; ++i) fits = shape[i].name || shape[i].number == size(array, i);
  if (!fits)
    throw std::invalid_argument(std::string(name) + ": found " + describe(array) + ", expected " + text(type) + " " +
                                text(shape));
  int64_t stride = 1;
  for (size_t i = shape.size; i-- > 0; stride *= size(array, i))
    if (size(array, i) > 1 && array.stride(i) != stride && array.size() > 0)
      throw std::invalid_argument(std::string(name) + ": " + describe(array) +
                                  " is not C-contiguous; pass np.ascontiguousarray of it");
  if (reinterpret_cast<uintptr_t>(array.data()) % (type.bits / 8) != 0)
    throw std::invalid_argument(std::string(name) + ": " + describe(array) +
                                " is not aligned to its type; pass a copy of it");
  return array.data();
}

template <class T>
const T* checked(const Input& array, const char* name, const Shape& shape) {
  return static_cast<const T*>(checked(array, name, nanobind::dtype<T>(), shape));
}

// A new NumPy array, to be filled while the GIL is released.
struct Result {
  DType type;
  std::vector<size_t> shape;
  std::unique_ptr<char[]> bytes;

  Result(DType t, const std::vector<int64_t>& s) : type(t), shape(s.begin(), s.end()) {
    size_t n = type.bits / 8;
    for (const size_t x : shape) n *= x;
    bytes.reset(new char[n]);
  }
  explicit Result(const std::vector<int64_t>& s) : Result(nanobind::dtype<float>(), s) {}
  float* data() { return reinterpret_cast<float*>(bytes.get()); }
  Array array() {
    char* p = bytes.get();
    nanobind::capsule owner(p, [](void* q) noexcept { delete[] static_cast<char*>(q); });
    bytes.release();
    return Array(p, shape.size(), shape.data(), owner, nullptr, type);
  }
};

}  // namespace bezel
