// Matrices and their products in the Python module.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bezel {
namespace {

using Input = nb::ndarray<nb::ro, nb::device::cpu>;  // read-only: weights come from a mapped file
using Output = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

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
    throw std::invalid_argument(name + ": " + describe(array) +
                                " is not aligned to its type; pass a copy of it");
  return static_cast<const T*>(array.data());
}

int64_t size(const Input& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

using Floats = std::unique_ptr<float[]>;

Floats allocate(int64_t n, int64_t cols) { return Floats(new float[static_cast<size_t>(n * cols)]); }

Output to_numpy(Floats&& values, int64_t n, int64_t cols) {
  float* const data = values.get();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  values.release();
  return Output(data, {static_cast<size_t>(n), static_cast<size_t>(cols)}, owner);
}

void make_matrix(Matrix* self, const Input& data, int64_t gguf_type, int64_t cols) {
  const uint8_t* bytes = checked<uint8_t>(data, 2, "data", "uint8 (rows, row_bytes)");
  new (self) Matrix(bytes, size(data, 0), size(data, 1), gguf_type, cols);
}

std::vector<Output> linear_py(ThreadPool& pool, const Input& x, const std::vector<const Matrix*>& matrices,
                              bool exact) {
  const float* activations = checked<float>(x, 2, "x", "float32 (n, cols)");
  const int64_t n = size(x, 0), cols = size(x, 1);
  for (size_t i = 0; i < matrices.size(); ++i)
    if (matrices[i] == nullptr || matrices[i]->cols != cols)
      throw std::invalid_argument(
          "x: found " + describe(x) + ", but matrices[" + std::to_string(i) + "] " +
          (matrices[i] == nullptr ? "is None" : "has " + std::to_string(matrices[i]->cols) + " columns"));
  std::vector<Floats> y;
  std::vector<float*> to;
  for (const Matrix* matrix : matrices) {
    y.push_back(allocate(n, matrix->rows));
    to.push_back(y.back().get());
  }
  {
    nb::gil_scoped_release release;  // not a call_guard: the results below need the GIL
    linear(selected_isa(), pool, activations, n, matrices.data(), static_cast<int>(matrices.size()), to.data(),
           exact ? Activations::f32 : Activations::int8);
  }
  std::vector<Output> results;
  for (size_t i = 0; i < y.size(); ++i) results.push_back(to_numpy(std::move(y[i]), n, matrices[i]->rows));
  return results;
}

Output feed_forward_py(ThreadPool& pool, const Input& x, const Matrix& gate, const Matrix& up, const Matrix& down,
                       bool exact) {
  const float* activations = checked<float>(x, 2, "x", "float32 (n, cols)");
  const int64_t n = size(x, 0), cols = size(x, 1);
  const auto shape = [](const Matrix& w) {
    return "(" + std::to_string(w.rows) + ", " + std::to_string(w.cols) + ")";
  };
  if (gate.cols != cols || up.cols != cols || up.rows != gate.rows || down.cols != gate.rows)
    throw std::invalid_argument("x: found " + describe(x) + ", gate " + shape(gate) + ", up " + shape(up) +
                                " and down " + shape(down) + ", whose sizes do not fit each other");
  Floats y = allocate(n, down.rows);
  {
    nb::gil_scoped_release release;
    feed_forward(selected_isa(), pool, activations, n, gate, up, down, y.get(),
                 exact ? Activations::f32 : Activations::int8);
  }
  return to_numpy(std::move(y), n, down.rows);
}

Output embed_py(const Matrix& matrix, const Input& ids, float scale) {
  const int64_t* rows = checked<int64_t>(ids, 1, "ids", "int64 (n,)");
  const int64_t n = size(ids, 0);
  for (int64_t i = 0; i < n; ++i)
    if (rows[i] < 0 || rows[i] >= matrix.rows)
      throw std::invalid_argument("ids: found " + std::to_string(rows[i]) + " at " + std::to_string(i) +
                                  ", but the matrix has rows 0 to " + std::to_string(matrix.rows - 1));
  Floats out = allocate(n, matrix.cols);
  {
    nb::gil_scoped_release release;
    embed(matrix, rows, n, scale, out.get());
  }
  return to_numpy(std::move(out), n, matrix.cols);
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<Matrix>(m, "Matrix")
      .def("__init__", &make_matrix, "data"_a.noconvert(), "gguf_type"_a, "cols"_a, nb::keep_alive<1, 2>())
      .def_ro("rows", &Matrix::rows)
      .def_ro("cols", &Matrix::cols);
  m.def("linear", &linear_py, "pool"_a, "x"_a.noconvert(), "matrices"_a, "exact"_a = false);
  m.def("feed_forward", &feed_forward_py, "pool"_a, "x"_a.noconvert(), "gate"_a, "up"_a, "down"_a, "exact"_a = false);
  m.def("embed", &embed_py, "matrix"_a, "ids"_a.noconvert(), "scale"_a);
}

}  // namespace bezel
