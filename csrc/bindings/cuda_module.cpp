#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/cuda_attention_calls.h"
#include "bindings/cuda_cross_entropy_calls.h"
#include "bindings/cuda_lstm_calls.h"
#include "bindings/cuda_plan.h"
#include "bindings/export_card_plan.h"
#include "bindings/group_rules.h"
#include "bindings/torch_access.h"
#include "cuda/device.h"

#if defined(FASTOPT_HOST_SIM)
#include "host_sim/host_sim.h"
#define FASTOPT_CUDA_MODULE _native_cuda_sim
#else
#define FASTOPT_CUDA_MODULE _native_cuda
#endif

namespace py = pybind11;
using namespace fastopt;

PYBIND11_MODULE(FASTOPT_CUDA_MODULE, m) {
  m.doc() = "fastopt's CUDA kernels.";
  m.attr("update_rules") = describe_rules(cuda::kRuleInfo, cuda::kRuleCount);
  m.attr("toolkit_version") = cuda::toolkit_version();  // 13000 is 13.0

  m.def("unavailable", &cuda::unavailable,
        "Why there is no card to run on, in words, or an empty string.");
  m.def("driver_version", &cuda::driver_version, "The newest CUDA that the driver serves, or 0.");
  m.def("initialise", &torch_access::initialise, py::arg("torch"),
        "Connects to torch; returns what this torch lacks, in words, or an empty string.");
#if defined(FASTOPT_HOST_SIM)
  m.def("set_seed", &host_sim::set_seed, py::arg("seed"), "The order of threads and blocks.");
  m.def("set_max_resident_blocks", &host_sim::set_max_resident_blocks, py::arg("blocks"),
        "How many blocks the card holds at once; eight until this is called.");
#endif

  export_cuda_attention(m);
  export_cuda_cross_entropy(m);

  export_card_plan<CudaPlan>(m, "OptimizerPlan")
      .def("grad_norm", &CudaPlan::grad_norm, py::arg("order"), py::arg("table"),
           py::arg("partials"), py::arg("norm"), py::arg("stream"))
      .def("run", &CudaPlan::run, py::arg("rules"), py::arg("tail"), py::arg("table"),
           py::arg("functors"), py::arg("stream"));

  m.def(
      "load_lstm_kernels",
      [](int dtype, int device_index) {
        cuda::load_lstm_kernels(static_cast<DType>(dtype), device_index);
      },
      py::arg("dtype"), py::arg("device_index"));
  py::class_<CudaLstmLayer>(m, "LstmLayer", py::module_local())
      .def(py::init<int, int, int, int, int64_t, int64_t, int64_t, int64_t, py::object>(),
           py::arg("dtype"), py::arg("device_type"), py::arg("device_index"), py::arg("directions"),
           py::arg("steps"), py::arg("batch"), py::arg("tokens"), py::arg("hidden"),
           py::arg("first_token"))
      .def("grid", &cuda_lstm_grid, py::arg("backward"), py::arg("tf32"))
      .def("workspace", &cuda_lstm_workspace, py::arg("grid"))
      .def("exchange_width", &cuda_lstm_exchange_width, py::arg("backward"))
      .def("forward", &cuda_lstm_forward, py::arg("grid"), py::arg("tf32"), py::arg("weights"),
           py::arg("exchange"), py::arg("counters"), py::arg("gates"), py::arg("save_gates"),
           py::arg("initial_hidden"), py::arg("cells"), py::arg("output"), py::arg("final_hidden"),
           py::arg("saved_cells"), py::arg("stream"))
      .def("backward", &cuda_lstm_backward, py::arg("grid"), py::arg("tf32"), py::arg("weights"),
           py::arg("exchange"), py::arg("counters"), py::arg("gates"), py::arg("saved_cells"),
           py::arg("initial_cell"), py::arg("output_gradient"), py::arg("final_hidden_gradient"),
           py::arg("cell_gradient"), py::arg("gate_gradient"), py::arg("initial_hidden_gradient"),
           py::arg("partial_sums"), py::arg("stream"))
      .def("cell_forward", &cuda_lstm_cell_forward, py::arg("rows"), py::arg("gates"),
           py::arg("product"), py::arg("save_gates"), py::arg("cells"), py::arg("saved_cells"),
           py::arg("hidden_out"), py::arg("output"), py::arg("stream"))
      .def("cell_backward", &cuda_lstm_cell_backward, py::arg("rows"), py::arg("gates"),
           py::arg("cells"), py::arg("cells_before"), py::arg("hidden_gradient"),
           py::arg("output_gradient"), py::arg("cell_gradient"), py::arg("gate_gradient"),
           py::arg("hidden_out"), py::arg("stream"));
}
