// The Python module. Everything that comes from Python is checked here; the kernels trust what they are given.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "base/bus_error.h"
#include "base/cpu.h"
#include "base/thread_pool.h"
#include "base/topology.h"

namespace bezel {
void bind_attention(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_probe(nanobind::module_& m);
void bind_text(nanobind::module_& m);
}  // namespace bezel

namespace nb = nanobind;
using namespace nb::literals;

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
  m.def("explain_bus_errors", [] {
    explain_bus_errors("Error: a model file was cut short or changed by another program while it was in use\n");
  });

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("threads", &ThreadPool::threads);

  bind_linear(m);
  bind_attention(m);
  bind_probe(m);
  bind_text(m);
}
