#include "bindings/cuda_cross_entropy_calls.h"

#include <vector>

#include "bindings/cross_entropy_tensors.h"
#include "bindings/simulated_memory.h"
#include "cuda/cross_entropy.h"

namespace py = pybind11;

namespace fastopt {

namespace {

void cross_entropy(const CrossEntropyRows& rows, int device_type, int device_index,
                   uintptr_t stream) {
  const CrossEntropyCall call = cross_entropy_call(rows, Place{device_type, device_index});
  if (call.rows == 0) return;
  const int64_t precise_bytes = bytes_of(compute_dtype(call.dtype));
  const int64_t elements = (call.rows - 1) * call.row_stride + call.classes;
  py::gil_scoped_release released;
  [[maybe_unused]] const SimulatedMemory memory({
      {call.logits, elements * bytes_of(call.dtype), 0},
      {call.losses, call.rows * precise_bytes, 1},
      {call.logsumexps, call.rows * precise_bytes, 2},
  });
  cuda::launch_cross_entropy(call, {device_index, reinterpret_cast<void*>(stream)});
}

void load_cross_entropy(int dtype, int device_index) {
  py::gil_scoped_release released;
  cuda::load_cross_entropy_kernels(static_cast<DType>(dtype), device_index);
}

}  // namespace

void export_cuda_cross_entropy(py::module_& m) {
  export_cross_entropy_rows(m);
  m.def("cross_entropy", &cross_entropy, py::arg("rows"), py::arg("device_type"),
        py::arg("device_index"), py::arg("stream"));
  m.def("load_cross_entropy", &load_cross_entropy, py::arg("dtype"), py::arg("device_index"),
        "Loads the kernels of a dtype on a card, so that none is loaded inside a graph's capture.");
}

}  // namespace fastopt
