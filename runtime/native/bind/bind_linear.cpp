// Matrices and their products in the Python module.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind/bind_arrays.h"
#include "linear/linear.h"
#include "base/thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bezel {
namespace {

void make_matrix(Matrix* self, const Input& data, int64_t gguf_type, int64_t cols) {
  const uint8_t* bytes = checked<uint8_t>(data, "data", {"rows", "row_bytes"});
  new (self) Matrix(bytes, size(data, 0), size(data, 1), gguf_type, cols);
}

std::vector<Array> linear_py(ThreadPool& pool, const Input& x, const std::vector<const Matrix*>& matrices,
                             bool exact) {
  const float* activations = checked<float>(x, "x", {"n", "cols"});
  const int64_t n = size(x, 0), cols = size(x, 1);
  for (size_t i = 0; i < matrices.size(); ++i)
    if (matrices[i] == nullptr || matrices[i]->cols != cols)
      throw std::invalid_argument(
          "x: found " + describe(x) + ", but matrices[" + std::to_string(i) + "] " +
          (matrices[i] == nullptr ? "is None" : "has " + std::to_string(matrices[i]->cols) + " columns"));
  std::vector<Result> y;
  std::vector<float*> to;
  for (const Matrix* matrix : matrices) {
    y.emplace_back(std::vector<int64_t>{n, matrix->rows});
    to.push_back(y.back().data());
  }
  {
    nb::gil_scoped_release release;  // not a call_guard: the results below need the GIL
    linear(selected_isa(), pool, activations, n, matrices.data(), static_cast<int>(matrices.size()), to.data(),
           exact ? Activations::f32 : Activations::int8);
  }
  std::vector<Array> results;
  for (Result& result : y) results.push_back(result.array());
  return results;
}

Array feed_forward_py(ThreadPool& pool, const Input& x, const Matrix& gate, const Matrix& up, const Matrix& down,
                      bool exact) {
  const float* activations = checked<float>(x, "x", {"n", "cols"});
  const int64_t n = size(x, 0), cols = size(x, 1);
  const auto shape = [](const Matrix& w) {
    return "(" + std::to_string(w.rows) + ", " + std::to_string(w.cols) + ")";
  };
  if (gate.cols != cols || up.cols != cols || up.rows != gate.rows || down.cols != gate.rows)
    throw std::invalid_argument("x: found " + describe(x) + ", gate " + shape(gate) + ", up " + shape(up) +
                                " and down " + shape(down) + ", whose sizes do not fit each other");
  Result y({n, down.rows});
  {
    nb::gil_scoped_release release;
    feed_forward(selected_isa(), pool, activations, n, gate, up, down, y.data(),
                 exact ? Activations::f32 : Activations::int8);
  }
  return y.array();
}

Array embed_py(const Matrix& matrix, const Input& ids, float scale) {
  const int64_t* rows = checked<int64_t>(ids, "ids", {"n"});
  const int64_t n = size(ids, 0);
  for (int64_t i = 0; i < n; ++i)
    if (rows[i] < 0 || rows[i] >= matrix.rows)
      throw std::invalid_argument("ids: found " + std::to_string(rows[i]) + " at " + std::to_string(i) +
                                  ", but the matrix has rows 0 to " + std::to_string(matrix.rows - 1));
  Result out({n, matrix.cols});
  {
    nb::gil_scoped_release release;
    embed(matrix, rows, n, scale, out.data());
  }
  return out.array();
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
