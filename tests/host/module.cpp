// The Python side of the host run: its settings and counters. The ops are registered with torch by csrc/cuda itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host.h"
#ifdef EP_SELFTEST
#include "selftest.h"
#endif

namespace py = pybind11;
using namespace ep::cuda::host;

namespace {

void set_order(const std::variant<std::string, uint64_t>& order) {
  if (const auto* seed = std::get_if<uint64_t>(&order)) {
    settings().order = Order::kRandom;
    settings().seed = *seed;
  } else if (std::get<std::string>(order) == "forward") {
    settings().order = Order::kForward;
  } else if (std::get<std::string>(order) == "reverse") {
    settings().order = Order::kReverse;
  } else {
    throw py::value_error("set_order: argument 'order': expected 'forward', 'reverse' or a seed, got '" +
                          std::get<std::string>(order) + "'");
  }
}

void set_device(int processors, int major, int minor, int shared_memory) {
  settings().processors = processors;
  settings().major = major;
  settings().minor = minor;
  settings().shared_memory = shared_memory;
}

py::dict statistics() {
  py::dict result;
  result["kernels"] = counters().kernels;
  result["graph_launches"] = counters().graph_launches;
  result["copies"] = counters().copies;
  result["memsets"] = counters().memsets;
  result["live"] = live();
  return result;
}

void reset_statistics() { counters() = Counters(); }

}  // namespace

PYBIND11_MODULE(EP_MODULE, m) {
  m.def("set_order", set_order, py::arg("order"), "The turns of a block's threads: 'forward', 'reverse' or a seed.");
  m.def("set_device", set_device, py::kw_only(), py::arg("processors") = Settings().processors,
        py::arg("major") = Settings().major, py::arg("minor") = Settings().minor,
        py::arg("shared_memory") = Settings().shared_memory, "What the device says of itself.");
  m.def("statistics", statistics,
        "Counts since reset_statistics: kernels by name, graph_launches, copies, memsets; live.");
  m.def("reset_statistics", reset_statistics);
#ifdef EP_SELFTEST
  namespace selftest = ep::cuda::selftest;
  m.def("run", selftest::run, py::arg("kernel"), py::kw_only(), py::arg("blocks") = 1, py::arg("threads") = 32,
        py::arg("shared") = 0, py::arg("input") = 0, py::arg("output") = 0, py::arg("option") = 0);
  m.def("launch_error", selftest::launch_error);
  m.def("graph", selftest::graph);
  m.def("capture_error", selftest::capture_error);
  m.def("convert", selftest::convert);
#endif
}
