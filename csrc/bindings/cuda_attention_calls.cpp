#include "bindings/cuda_attention_calls.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/attention_tensors.h"
#include "bindings/simulated_memory.h"
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

// Of what a kernel writes, for the simulator.
class Written {
 public:
  explicit Written(const Place& place) : place_(place) {}

  Written& add(py::handle tensor) {
    if (tensor.is_none()) return *this;
    const Description given = described(tensor, "a result", place_);
    int64_t last = 0;
    for (int i = 0; i < given.dims; ++i) {
      if (given.sizes[i] == 0) return *this;
      last += (given.sizes[i] - 1) * given.strides[i];
    }
    extents_.emplace_back(given.data, (last + 1) * given.dtype.bits / 8, extents_.size());
    return *this;
  }
  SimulatedMemory simulated() { return SimulatedMemory(std::move(extents_)); }

 private:
  Place place_;
  std::vector<Extent> extents_;
};

void attention_forward(const AttentionTensors& given, py::object output, py::object logsumexp,
                       bool tf32, int device_type, int device_index, uintptr_t stream) {
  const Place place{device_type, device_index};
  const AttentionForward call = forward_call(given, place, output, logsumexp);
  Written written(place);
  written.add(output).add(logsumexp);
  py::gil_scoped_release released;
  [[maybe_unused]] const SimulatedMemory memory = written.simulated();
  cuda::launch_attention_forward(call, work_on(place, tf32, stream));
}

void attention_backward(const AttentionTensors& given, py::object output, py::object logsumexp,
                        py::object output_gradient, const std::vector<py::object>& gradients,
                        py::object deltas, py::object query_sums, bool tf32, int device_type,
                        int device_index, uintptr_t stream) {
  const Place place{device_type, device_index};
  const AttentionBackward call =
      backward_call(given, place, output, logsumexp, output_gradient, gradients);
  const AttentionLayer& layer = call.layer;
  if (call.bias_gradient && layer.queries > 1 && call.bias_gradient_strides[2] == 0) {
    throw std::invalid_argument("the gradient of bias must have a row for each query");
  }
  Sizes rows{layer.query_starts ? 1 : layer.batch, layer.heads, layer.query_rows};
  float* const delta_data =
      static_cast<float*>(present(deltas, "deltas", rows, DType::kFloat32, place));
  rows.push_back(layer.features);
  float* const sums =
      static_cast<float*>(address(query_sums, "query_sums", rows, DType::kFloat32, place));
  Written written(place);
  written.add(deltas).add(query_sums);
  for (const py::object& gradient : gradients) written.add(gradient);
  py::gil_scoped_release released;
  [[maybe_unused]] const SimulatedMemory memory = written.simulated();
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
        py::arg("logsumexp"), py::arg("tf32"), py::arg("device_type"), py::arg("device_index"),
        py::arg("stream"));
  m.def("attention_backward", &attention_backward, py::arg("layer"), py::arg("output"),
        py::arg("logsumexp"), py::arg("output_gradient"), py::arg("gradients"), py::arg("deltas"),
        py::arg("query_sums"), py::arg("tf32"), py::arg("device_type"), py::arg("device_index"),
        py::arg("stream"));
  m.def("load_attention", &load_attention, py::arg("dtype"), py::arg("tf32"),
        py::arg("device_index"),
        "Loads the kernels of a dtype on a card, so that none is loaded inside a graph's capture.");
}

}  // namespace fastopt
