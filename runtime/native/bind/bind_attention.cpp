// Attention, its caches, and the elementwise operations in the Python module.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "bind/bind_arrays.h"
#include "elementwise/elementwise.h"
#include "attention/kv_store.h"
#include "base/thread_pool.h"
#include "simd/vector_kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bezel {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

KvType kv_type(const std::string& kv) {
  if (kv == "f32") return KvType::f32;
  if (kv == "f16") return KvType::f16;
  if (kv == "int8") return KvType::int8;
  refuse("kv is '" + kv + "', expected 'f32', 'f16' or 'int8'");
}

DType storage_type(const KVStore& store) {
  switch (store.type()) {
    case KvType::f16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    case KvType::int8: return nb::dtype<int8_t>();
    default: return nb::dtype<float>();
  }
}

// n positions from `position` on.
void check_span(const KVStore& store, int64_t position, int64_t n) {
  constexpr int64_t kMost = int64_t{1} << 40;
  if (position < 0 || position > kMost || n < 0 || n > store.capacity())
    refuse("positions " + std::to_string(position) + " to " + std::to_string(position + n) +
           " do not fit a store of " + std::to_string(store.capacity()) + " positions");
}

float positive(double x, const char* name) {
  if (!(x > 0 && std::isfinite(static_cast<float>(x)))) refuse(std::string(name) + " is not a positive number");
  return static_cast<float>(x);
}

void write(KVStore& store, ThreadPool& pool, int64_t position, const Input& keys, const Input& values) {
  const float* k = checked<float>(keys, "keys", {"n", store.kv_heads(), store.head_dim()});
  const float* v = checked<float>(values, "values", {size(keys, 0), store.kv_heads(), store.head_dim()});
  check_span(store, position, size(keys, 0));
  nb::gil_scoped_release release;
  store.write(pool, position, size(keys, 0), k, v);
}

Array attend_py(const KVStore& store, ThreadPool& pool, const Input& queries, const Input& first, const Input& last,
                double scale, std::optional<double> softcap) {
  const float* q = checked<float>(queries, "queries", {"n", "heads", store.head_dim()});
  const int64_t n = size(queries, 0), heads = size(queries, 1);
  const int64_t *from = checked<int64_t>(first, "first", {n}), *to = checked<int64_t>(last, "last", {n});
  if (heads == 0 || heads % store.kv_heads() != 0)
    refuse("queries: found " + std::to_string(heads) + " heads, expected a multiple of the store's " +
           std::to_string(store.kv_heads()));
  for (int64_t i = 0; i < n; ++i)
    if (from[i] < 0 || from[i] >= to[i])
      refuse("query " + std::to_string(i) + " sees the positions " + std::to_string(from[i]) + " to " +
             std::to_string(to[i]) + ", expected one at least, from 0 on");
  if (n > 0) {
    const int64_t oldest = *std::min_element(from, from + n);
    check_span(store, oldest, *std::max_element(to, to + n) - oldest);
  }
  if (!std::isfinite(scale)) refuse("scale is not a finite number");
  const float cap = softcap ? positive(*softcap, "softcap") : 0.0f;
  Result out({n, heads, store.head_dim()});
  {
    nb::gil_scoped_release release;
    attend(store, pool, q, n, heads, from, to, static_cast<float>(scale), cap, out.data());
  }
  return out.array();
}

nb::dict raw(const KVStore& store, int64_t start, int64_t stop) {
  check_span(store, start, stop - start);
  nb::dict arrays;
  for (const bool values : {false, true}) {
    Result rows(storage_type(store), {stop - start, store.kv_heads(), store.head_dim()});
    Result scales({stop - start, store.type() == KvType::int8 ? store.kv_heads() : 0});
    {
      nb::gil_scoped_release release;
      store.read_raw(start, stop - start, values, rows.data(), scales.data());
    }
    arrays[values ? "values" : "keys"] = rows.array();
    if (store.type() == KvType::int8) arrays[values ? "value_scales" : "key_scales"] = scales.array();
  }
  return arrays;
}

void set_raw(KVStore& store, int64_t start, const nb::dict& arrays) {
  const auto get = [&](const char* name) {
    if (!arrays.contains(name)) refuse(std::string(name) + ": found nothing");
    return nb::cast<Input>(arrays[name], false);
  };
  struct Side {
    Input rows, scales;
  } sides[2];
  Size n("n");
  const bool scaled = store.type() == KvType::int8;
  for (const bool values : {false, true}) {  // all of them, before a byte is changed
    const char* const name = values ? "values" : "keys";
    Side& side = sides[values];
    side.rows = get(name);
    checked(side.rows, name, storage_type(store), {n, store.kv_heads(), store.head_dim()});
    n = size(side.rows, 0);
    if (!scaled) continue;
    const char* const scales_name = values ? "value_scales" : "key_scales";
    side.scales = get(scales_name);
    checked<float>(side.scales, scales_name, {n, store.kv_heads()});
  }
  check_span(store, start, n.number);
  nb::gil_scoped_release release;
  for (const bool values : {false, true})
    store.write_raw(start, n.number, values, sides[values].rows.data(),
                    scaled ? static_cast<const float*>(sides[values].scales.data()) : nullptr);
}

Array rms_norm_py(const Input& x, const Input& weight, double eps, ThreadPool& pool) {
  if (x.ndim() == 0) refuse("x: found a single number, expected rows");
  std::vector<int64_t> shape;
  for (size_t i = 0; i < x.ndim(); ++i) shape.push_back(size(x, i));
  const int64_t dim = shape.back();
  const float* data = checked<float>(x, "x", std::vector<Size>(shape.begin(), shape.end()));
  const float* w = checked<float>(weight, "weight", {dim});
  Result y(shape);
  {
    nb::gil_scoped_release release;
    rms_norm(data, w, static_cast<float>(eps), dim ? static_cast<int64_t>(x.size()) / dim : 0, dim, pool, y.data());
  }
  return y.array();
}

nb::tuple add_norm_py(const Input& x, const Input& h, const std::optional<Input>& post_weight,
                      const Input& next_weight, double eps, ThreadPool& pool) {
  const float* data = checked<float>(x, "x", {"n", "cols"});
  const std::vector<int64_t> shape{size(x, 0), size(x, 1)};
  const float* added = checked<float>(h, "h", {shape[0], shape[1]});
  const float* post = post_weight ? checked<float>(*post_weight, "post_weight", {shape[1]}) : nullptr;
  const float* next = checked<float>(next_weight, "next_weight", {shape[1]});
  Result sum(shape), y(shape);
  {
    nb::gil_scoped_release release;
    add_norm(data, added, post, next, static_cast<float>(eps), shape[0], shape[1], pool, sum.data(), y.data());
  }
  return nb::make_tuple(sum.array(), y.array());
}

Array layer_norm_py(const Input& x, const Input& weight, const Input& bias, double eps, ThreadPool& pool) {
  const float* data = checked<float>(x, "x", {"n", "cols"});
  const std::vector<int64_t> shape{size(x, 0), size(x, 1)};
  const float* w = checked<float>(weight, "weight", {shape[1]});
  const float* b = checked<float>(bias, "bias", {shape[1]});
  Result y(shape);
  {
    nb::gil_scoped_release release;
    layer_norm(data, w, b, static_cast<float>(eps), shape[0], shape[1], pool, y.data());
  }
  return y.array();
}

void bias_gelu_py(const InOut& x, const Input& bias, ThreadPool& pool) {
  float* data = static_cast<float*>(checked(x, "x", nb::dtype<float>(), {"n", "cols"}));
  const int64_t n = size(x, 0), dim = size(x, 1);
  const float* b = checked<float>(bias, "bias", {dim});
  nb::gil_scoped_release release;
  bias_gelu(data, b, n, dim, pool);
}

void softcap_py(const InOut& x, double cap, ThreadPool& pool) {
  float* data = static_cast<float*>(checked(x, "x", nb::dtype<float>(), {"n", "cols"}));
  const float limit = positive(cap, "cap");
  nb::gil_scoped_release release;
  softcap(data, limit, static_cast<int64_t>(x.size()), pool);
}

void rope_py(const InOut& x, const Input& positions, double base, double factor, ThreadPool& pool) {
  float* data = static_cast<float*>(checked(x, "x", nb::dtype<float>(), {"n", "heads", "head_dim"}));
  const int64_t n = size(x, 0), head_dim = size(x, 2);
  const int64_t* at = checked<int64_t>(positions, "positions", {n});
  if (head_dim % 2 != 0) refuse("x: found a head_dim of " + std::to_string(head_dim) + ", expected an even number");
  for (int64_t i = 0; i < n; ++i)
    if (at[i] < 0) refuse("positions: found " + std::to_string(at[i]) + " at " + std::to_string(i));
  positive(base, "base");
  const float divisor = positive(factor, "factor");
  nb::gil_scoped_release release;
  rope(data, n, size(x, 1), head_dim, at, base, divisor, pool);
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<KVStore>(m, "KVStore")
      .def(
          "__init__",
          [](KVStore* self, int64_t kv_heads, int64_t head_dim, int64_t capacity, const std::string& kv) {
            new (self) KVStore(kv_heads, head_dim, capacity, kv_type(kv), vector_kernels().attention);
          },
          "kv_heads"_a, "head_dim"_a, "capacity"_a, "kv"_a)
      .def_static(
          "bytes_for",
          [](int64_t kv_heads, int64_t head_dim, int64_t capacity, const std::string& kv, int64_t positions) {
            if (positions < 0) refuse("positions is " + std::to_string(positions) + ", expected 0 or more");
            return KVStore::bytes_for(kv_heads, head_dim, capacity, kv_type(kv), vector_kernels().attention, positions);
          },
          "kv_heads"_a, "head_dim"_a, "capacity"_a, "kv"_a, "positions"_a)
      .def_prop_ro("nbytes", &KVStore::nbytes)
      .def("write", &write, "pool"_a, "position"_a, "keys"_a.noconvert(), "values"_a.noconvert())
      .def("attend", &attend_py, "pool"_a, "queries"_a.noconvert(), "first"_a.noconvert(), "last"_a.noconvert(),
           "scale"_a, "softcap"_a.none())
      .def("raw", &raw, "start"_a, "stop"_a)
      .def("set_raw", &set_raw, "start"_a, "arrays"_a);

  m.def("rms_norm", &rms_norm_py, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a, "pool"_a);
  m.def("add_norm", &add_norm_py, "x"_a.noconvert(), "h"_a.noconvert(), "post_weight"_a.none(),
        "next_weight"_a.noconvert(), "eps"_a, "pool"_a);
  m.def("layer_norm", &layer_norm_py, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert(), "eps"_a,
        "pool"_a);
  m.def("bias_gelu", &bias_gelu_py, "x"_a.noconvert(), "bias"_a.noconvert(), "pool"_a);
  m.def("softcap", &softcap_py, "x"_a.noconvert(), "cap"_a, "pool"_a);
  m.def("rope", &rope_py, "x"_a.noconvert(), "positions"_a.noconvert(), "base"_a, "factor"_a, "pool"_a);
}

}  // namespace bezel
