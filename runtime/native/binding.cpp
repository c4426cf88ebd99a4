// The Python module. Everything that comes from Python is checked here; the kernels trust what they are given.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "gemv.h"
#include "kernels.h"
#include "thread_pool.h"
#include "topology.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bezel {
namespace {

using Input = nb::ndarray<nb::ro, nb::device::cpu>;  // read-only: weights come from a mapped file
using Vector = nb::ndarray<nb::numpy, float, nb::ndim<1>>;

std::string describe(const Input& array) {
  static const char* const kinds[] = {"int", "uint", "float"};
  const nb::dlpack::dtype type = array.dtype();
  std::string text = type.code < 3 ? kinds[type.code] + std::to_string(type.bits) : "another type";
  text += " (";
  for (size_t i = 0; i < array.ndim(); ++i)
    text += std::to_string(array.shape(i)) + (i + 1 < array.ndim() ? ", " : "");
  return text + (array.ndim() == 1 ? ",)" : ")");
}

// The data of a C-contiguous array of T with `ndim` dimensions; throws std::invalid_argument for any other.
template <class T>
const T* checked(const Input& array, size_t ndim, const std::string& name, const std::string& expected) {
  if (array.dtype() != nb::dtype<T>() || array.ndim() != ndim)
    throw std::invalid_argument(name + ": found " + describe(array) + ", expected " + expected);
  int64_t stride = 1;
  for (size_t i = ndim; i-- > 0; stride *= static_cast<int64_t>(array.shape(i)))
    if (array.shape(i) > 1 && array.stride(i) != stride && array.size() > 0)
      throw std::invalid_argument(name + ": " + describe(array) +
                                  " is not C-contiguous; pass np.ascontiguousarray of it");
  if (reinterpret_cast<uintptr_t>(array.data()) % alignof(T) != 0)
    throw std::invalid_argument(name + ": " + describe(array) + " is not aligned to its type; pass a copy of it");
  return static_cast<const T*>(array.data());
}

Vector gemv_q8_0_py(const Input& weights, const Input& x, ThreadPool& pool) {
  const uint8_t* w = checked<uint8_t>(weights, 2, "weights", "uint8 (rows, row_bytes)");
  const float* activations = checked<float>(x, 1, "x", "float32 (n,)");
  const int64_t rows = static_cast<int64_t>(weights.shape(0)), n = static_cast<int64_t>(x.shape(0));
  if (n == 0 || n % kBlock != 0)
    throw std::invalid_argument("x: found " + std::to_string(n) +
                                " elements, expected a positive multiple of " + std::to_string(kBlock));
  const int64_t row_bytes = n / kBlock * kQ8_0Bytes;
  if (static_cast<int64_t>(weights.shape(1)) != row_bytes)
    throw std::invalid_argument("weights: found rows of " + std::to_string(weights.shape(1)) +
                                " bytes, expected " + std::to_string(row_bytes) + ", the size of " +
                                std::to_string(n) + " weights in Q8_0");

  std::unique_ptr<float[]> y(new float[static_cast<size_t>(rows)]);
  {
    nb::gil_scoped_release release;  // not a call_guard: the result below needs the GIL
    gemv_q8_0(w, rows, n / kBlock, activations, pool, y.get());
  }
  float* data = y.get();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  y.release();
  return Vector(data, {static_cast<size_t>(rows)}, owner);
}

}  // namespace
}  // namespace bezel

NB_MODULE(_native, m) {
  using namespace bezel;
  m.doc() = "bezel's native kernels; _native.pyi describes each function.";

  m.def("isa", [] { return std::string(name(selected_isa())); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa isa : usable_isas()) names.emplace_back(name(isa));
    return names;
  });
  m.def("default_threads", &default_threads);

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("threads", &ThreadPool::threads);

  m.def("gemv_q8_0", &gemv_q8_0_py, "weights"_a.noconvert(), "x"_a.noconvert(), "pool"_a);
}
