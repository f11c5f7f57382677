#pragma once

#include <pybind11/pybind11.h>

#include "bindings/card_plan.h"
#include "bindings/collectable.h"

namespace fastopt {

// What every plan in a card's memory has; the caller adds what launches.
template <class Plan>
pybind11::class_<Plan> export_card_plan(pybind11::module_& m, const char* name) {
  namespace py = pybind11;
  return py::class_<Plan>(m, name, py::module_local(),
                          py::custom_type_setup(make_collectable<Plan>))
      .def(py::init<py::dict, py::list, int, int, bool>(), py::arg("state"), py::arg("groups"),
           py::arg("device_type"), py::arg("device_index"), py::arg("counts_here_on_host"))
      .def("collect", &Plan::collect, py::arg("param_groups"), py::arg("state"), py::arg("writing"))
      .def("gradients", &Plan::gradients)
      .def_property_readonly("table_bytes", &Plan::table_bytes)
      .def_property_readonly("table_version", &Plan::table_version)
      .def_property_readonly("functor_bytes", &Plan::functor_bytes)
      .def_property_readonly("squares_offset", &Plan::squares_offset)
      .def_property_readonly("chunk_count", &Plan::chunk_count)
      .def("table", &Plan::table, py::arg("address"))
      .def("release", &Plan::release);
}

}  // namespace fastopt
