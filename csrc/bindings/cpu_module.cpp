#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/attention_calls.h"
#include "bindings/collectable.h"
#include "bindings/cross_entropy_calls.h"
#include "bindings/export_card_plan.h"
#include "bindings/gradient_list.h"
#include "bindings/layout.h"
#include "bindings/lstm_calls.h"
#include "bindings/optimizer_plan.h"
#include "bindings/torch_access.h"
#include "bindings/triton_plan.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"

namespace py = pybind11;
using namespace fastopt;

namespace {

// Whether kernels of a type of device can read all of them as they are; None is nothing to read.
bool are_plain(py::list tensors, int device_type) {
  for (py::handle tensor : tensors) {
    torch_access::Description description;
    if (tensor.is_none()) continue;
    if (!torch_access::has_plain_type(tensor.ptr()) ||
        !torch_access::describe(tensor.ptr(), description) ||
        description.device_type != device_type ||
        torch_access::is_lazily_changed(tensor.ptr(), description)) {
      return false;
    }
  }
  return true;
}

bool may_overlap_itself(std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  return Layout{DType::kFloat32, std::move(sizes), std::move(strides)}.may_overlap_itself();
}

}  // namespace

PYBIND11_MODULE(_native_cpu, m) {
  m.doc() = "fastopt's CPU kernels.";
  install_fork_guard();

  m.attr("instruction_set") = chosen_instruction_set().name;
  py::list available;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.runs_here) available.append(set.name);
  }
  m.attr("instruction_sets") = py::tuple(available);

  const OptimizerKernels& kernels = *chosen_instruction_set().optimizer;
  m.attr("update_rules") = describe_rules(kernels.rules, kernels.rule_count);

  m.def("initialise", &torch_access::initialise, py::arg("torch"),
        "Connects to torch; returns what this torch lacks, in words, or an empty string.");
  m.def("are_plain", &are_plain, py::arg("tensors"), py::arg("device_type"));
  m.def("may_overlap_itself", &may_overlap_itself, py::arg("sizes"), py::arg("strides"),
        "False only where no two indices mean the same address.");

  py::class_<LstmTensors>(m, "LstmTensors", py::module_local())
      .def(py::init([](py::object input, std::optional<std::vector<int64_t>> batch_sizes,
                       py::object initial_hidden, py::object initial_cell,
                       std::vector<py::object> weights) {
             return LstmTensors{std::move(input), std::move(batch_sizes), std::move(initial_hidden),
                                std::move(initial_cell), std::move(weights)};
           }),
           py::arg("input"), py::arg("batch_sizes"), py::arg("initial_hidden"),
           py::arg("initial_cell"), py::arg("weights"));
  m.def("lstm_forward", &lstm_forward, py::arg("layer"), py::arg("packed"), py::arg("results"),
        py::arg("threads"));
  m.def("lstm_packed_bytes", &lstm_packed_bytes, py::arg("layer"));
  m.def("lstm_pack", &lstm_pack, py::arg("layer"), py::arg("packed"), py::arg("threads"));
  m.def("lstm_backward", &lstm_backward, py::arg("layer"), py::arg("saved"), py::arg("gradients"),
        py::arg("results"), py::arg("threads"));
  m.def("activate", &activate, py::arg("function"), py::arg("input"), py::arg("output"));
  m.def(
      "fma_peak", [](int threads) { return chosen_instruction_set().lstm->fma_rate(threads); },
      py::arg("threads"), "fp32 operations per second with all data in registers and L1.");

  export_attention_tensors(m);
  m.def("attention_check", &attention_check, py::arg("layer"));
  m.def("attention_forward", &attention_forward, py::arg("layer"), py::arg("output"),
        py::arg("logsumexp"), py::arg("inference"), py::arg("threads"));
  m.def("attention_backward", &attention_backward, py::arg("layer"), py::arg("output"),
        py::arg("logsumexp"), py::arg("output_gradient"), py::arg("gradients"), py::arg("threads"));
  m.def("random_words", &random_words, py::arg("seed"), py::arg("head"), py::arg("first_row"),
        py::arg("words"));

  export_cross_entropy_rows(m);
  m.def("cross_entropy", &cross_entropy, py::arg("rows"), py::arg("threads"));

  py::class_<OptimizerPlan>(m, "OptimizerPlan", py::module_local(),
                            py::custom_type_setup(make_collectable<OptimizerPlan>))
      .def(py::init<py::dict, py::list>(), py::arg("state"), py::arg("groups"))
      .def("collect", &OptimizerPlan::collect, py::arg("param_groups"), py::arg("state"),
           py::arg("writing"))
      .def("gradients", &OptimizerPlan::gradients)
      .def("grad_norm", &OptimizerPlan::grad_norm, py::arg("order"), py::arg("threads"))
      .def("run", &OptimizerPlan::run, py::arg("rules"), py::arg("tail"), py::arg("threads"))
      .def("release", &OptimizerPlan::release);

  m.attr("chunk") = kChunk;  // elements that a program of Triton's works on
  export_card_plan<TritonPlan>(m, "TritonPlan")
      .def("measure", &TritonPlan::measure, py::arg("table"))
      .def("run", &TritonPlan::run, py::arg("rules"), py::arg("tail"), py::arg("table"),
           py::arg("functors"))
      .def("records", &TritonPlan::records);

  py::class_<GradientList>(m, "GradientList", py::module_local())
      .def(py::init<py::list, bool>(), py::arg("tensors"), py::arg("of_parameters"))
      .def_property_readonly("unreadable", &GradientList::unreadable)
      .def_property_readonly("unwritable", &GradientList::unwritable)
      .def_readonly("tensors", &GradientList::tensors)
      .def_readonly("has_complex", &GradientList::has_complex)
      .def_readonly("has_empty", &GradientList::has_empty)
      .def_property_readonly("dtypes", &GradientList::dtypes)
      .def("norm", &GradientList::norm, py::arg("order"), py::arg("threads"))
      .def("clip", &GradientList::clip, py::arg("scale"), py::arg("clip_value"),
           py::arg("threads"));
}
