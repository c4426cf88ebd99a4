// Python's side of the probes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "probe/probe.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bezel {
namespace {

using Data = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

double read_bandwidth_py(ThreadPool& pool, const Data& data) {
  const int64_t bytes = static_cast<int64_t>(data.size());
  if (bytes < kSmallestRead)
    throw std::invalid_argument("data: found " + std::to_string(bytes) + " bytes, expected at least " +
                                std::to_string(kSmallestRead));
  nb::gil_scoped_release release;
  return read_bandwidth(pool, data.data(), bytes);
}

}  // namespace

void bind_probe(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def("read_bandwidth", &read_bandwidth_py, "pool"_a, "data"_a.noconvert());
  m.def("int8_peak", &int8_peak, "pool"_a, "seconds"_a, release());
  m.def("float_peak", &float_peak, "pool"_a, "seconds"_a, release());
}

}  // namespace bezel
