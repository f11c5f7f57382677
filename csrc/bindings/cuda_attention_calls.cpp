#include "bindings/cuda_attention_calls.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "bindings/attention_tensors.h"
#include "bindings/cuda_place.h"
#include "bindings/layout.h"
#include "bindings/torch_access.h"
#include "cuda/attention.h"

namespace py = pybind11;

namespace fastopt {

namespace {

using torch_access::Description;

cuda::AttentionWork work_on(const Place& place, bool tf32, uintptr_t stream) {
  return {tf32 ? cuda::Float32::kTf32 : cuda::Float32::kExact,
          {place.device_index, reinterpret_cast<void*>(stream)}};
}

// Contiguous fp32 of so many elements.
float* floats(py::handle tensor, const char* name, const Place& place, int64_t count) {
  const Description given = described(tensor, name, place);
  bool fits = real_dtype_of(given) == DType::kFloat32;
  int64_t stride = 1;
  for (int i = given.dims - 1; fits && i >= 0; --i) {
    fits = given.sizes[i] == 1 || given.strides[i] == stride;
    stride *= given.sizes[i];
  }
  if (!fits || stride != count) {
    throw std::invalid_argument(std::string(name) + " must be contiguous fp32 of " +
                                std::to_string(count) + " elements");
  }
  return static_cast<float*>(given.data);
}

void attention_forward(const AttentionTensors& given, py::object output, py::object logsumexp,
                       bool tf32, int device_index, uintptr_t stream) {
  const Place place = cuda_place(device_index);
  const AttentionForward call = forward_call(given, place, output, logsumexp);
  py::gil_scoped_release released;
  cuda::launch_attention_forward(call, work_on(place, tf32, stream));
}

void attention_backward(const AttentionTensors& given, py::object output, py::object logsumexp,
                        py::object output_gradient, const std::vector<py::object>& gradients,
                        py::object deltas, py::object query_sums, bool tf32, int device_index,
                        uintptr_t stream) {
  const Place place = cuda_place(device_index);
  const AttentionBackward call =
      backward_call(given, place, output, logsumexp, output_gradient, gradients);
  const AttentionLayer& layer = call.layer;
  if (call.bias_gradient && layer.queries > 1 && call.bias_gradient_strides[2] == 0) {
    throw std::invalid_argument("the gradient of bias must have a row for each query");
  }
  const int64_t batches = layer.query_starts ? 1 : layer.batch;
  const int64_t rows = batches * layer.heads * layer.query_rows;
  float* const delta_data = floats(deltas, "deltas", place, rows);
  float* sums = nullptr;
  if (!query_sums.is_none()) {
    sums = floats(query_sums, "query_sums", place, rows * layer.features);
  }
  py::gil_scoped_release released;
  cuda::launch_attention_backward(call, delta_data, sums, work_on(place, tf32, stream));
}

void load_attention(int dtype, bool tf32, int device_index) {
  py::gil_scoped_release released;
  cuda::load_attention_kernels(static_cast<DType>(dtype),
                               tf32 ? cuda::Float32::kTf32 : cuda::Float32::kExact, device_index);
}

}  // namespace

void export_cuda_attention(py::module_& m) {
  export_attention_tensors(m);
  m.attr("most_attention_features") = cuda::kMostFeatures;
  m.def("attention_forward", &attention_forward, py::arg("layer"), py::arg("output"),
        py::arg("logsumexp"), py::arg("tf32"), py::arg("device_index"), py::arg("stream"));
  m.def("attention_backward", &attention_backward, py::arg("layer"), py::arg("output"),
        py::arg("logsumexp"), py::arg("output_gradient"), py::arg("gradients"), py::arg("deltas"),
        py::arg("query_sums"), py::arg("tf32"), py::arg("device_index"), py::arg("stream"));
  m.def("load_attention", &load_attention, py::arg("dtype"), py::arg("tf32"),
        py::arg("device_index"),
        "Loads the kernels of a dtype on a card, so that none is loaded inside a graph's capture.");
}

}  // namespace fastopt
