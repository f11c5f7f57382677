#include "bindings/lstm_calls.h"

#include <optional>
#include <stdexcept>

#include "bindings/layout.h"
#include "bindings/torch_access.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastopt {

namespace {

torch_access::Description described(py::handle tensor) {
  torch_access::Description description;
  if (!torch_access::describe(tensor.ptr(), description)) {
    throw std::invalid_argument("a tensor has no memory of its own");
  }
  return description;
}

void* address(py::handle tensor) { return tensor.is_none() ? nullptr : described(tensor).data; }

LstmLayer layer_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& batch_sizes,
                   const py::tuple& tensors, int threads) {
  const std::optional<DType> dtype = real_dtype_of(described(tensors[0]));
  if (!dtype) throw std::invalid_argument("no kernel has the dtype of the input");
  LstmLayer layer{};
  layer.dtype = *dtype;
  layer.threads = threads;
  layer.directions = static_cast<int>(sizes.at(0));
  layer.steps = sizes.at(1);
  layer.batch = sizes.at(2);
  layer.tokens = sizes.at(3);
  layer.batch_sizes = batch_sizes.data();
  layer.input_size = sizes.at(4);
  layer.hidden_size = sizes.at(5);
  layer.output_size = sizes.at(6);
  layer.input = address(tensors[0]);
  layer.input_step_stride = sizes.at(7);
  layer.input_row_stride = sizes.at(8);
  layer.initial_hidden = address(tensors[1]);
  layer.initial_cell = address(tensors[2]);
  for (int i = 0; i < layer.directions; ++i) {
    const int first = 3 + 5 * i;
    layer.weights[i] = {address(tensors[first]), address(tensors[first + 1]),
                        address(tensors[first + 2]), address(tensors[first + 3]),
                        address(tensors[first + 4])};
  }
  return layer;
}

}  // namespace

void lstm_forward(const std::vector<int64_t>& sizes, const std::vector<int64_t>& batch_sizes,
                  py::tuple layer, py::object packed, py::tuple results, int threads) {
  LstmForward call{};
  call.layer = layer_of(sizes, batch_sizes, layer, threads);
  call.packed = address(packed);
  call.output = address(results[0]);
  call.final_hidden = address(results[1]);
  call.final_cell = address(results[2]);
  call.saved_gates = address(results[3]);
  call.saved_cells = address(results[4]);
  py::gil_scoped_release released;
  chosen_instruction_set().lstm->forward(call);
}

namespace {

// For its weights alone: there are no steps.
LstmLayer weights_of(const std::vector<int64_t>& sizes, const py::tuple& layer, int threads) {
  LstmLayer result = layer_of(sizes, {}, layer, threads);
  result.steps = 0;
  return result;
}

}  // namespace

int64_t lstm_packed_bytes(const std::vector<int64_t>& sizes, py::tuple layer) {
  return chosen_instruction_set().lstm->packed_bytes(weights_of(sizes, layer, 1));
}

void lstm_pack(const std::vector<int64_t>& sizes, py::tuple layer, py::object packed, int threads) {
  chosen_instruction_set().lstm->pack(weights_of(sizes, layer, threads), address(packed));
}

void lstm_backward(const std::vector<int64_t>& sizes, const std::vector<int64_t>& batch_sizes,
                   py::tuple layer, py::tuple saved, py::tuple gradients, py::tuple results,
                   int threads) {
  LstmBackward call{};
  call.layer = layer_of(sizes, batch_sizes, layer, threads);
  call.output = address(saved[0]);
  call.saved_gates = address(saved[1]);
  call.saved_cells = address(saved[2]);
  call.output_gradient = address(gradients[0]);
  call.final_hidden_gradient = address(gradients[1]);
  call.final_cell_gradient = address(gradients[2]);
  call.input_gradient = address(results[0]);
  call.initial_hidden_gradient = address(results[1]);
  call.initial_cell_gradient = address(results[2]);
  for (int i = 0; i < call.layer.directions; ++i) {
    const int first = 3 + 4 * i;
    call.weights[i] = {address(results[first]), address(results[first + 1]),
                       address(results[first + 2]), address(results[first + 3])};
  }
  py::gil_scoped_release released;
  chosen_instruction_set().lstm->backward(call);
}

void activate(const std::string& function, py::object input, py::object output) {
  if (function != "exp" && function != "sigmoid" && function != "tanh") {
    throw std::invalid_argument("function must be exp, sigmoid or tanh, got " + function);
  }
  const torch_access::Description from = described(input), to = described(output);
  const std::optional<DType> dtype = real_dtype_of(from);
  int64_t count = 1, room = 1;
  for (int i = 0; i < from.dims; ++i) count *= from.sizes[i];
  for (int i = 0; i < to.dims; ++i) room *= to.sizes[i];
  if (from.dtype != to.dtype || count != room) {
    throw std::invalid_argument("input and output must be alike");
  }
  const LstmKernels& kernels = *chosen_instruction_set().lstm;
  if (dtype == DType::kFloat32) {
    kernels.activate_float(function[0], static_cast<const float*>(from.data),
                           static_cast<float*>(to.data), count);
  } else if (dtype == DType::kFloat64) {
    kernels.activate_double(function[0], static_cast<const double*>(from.data),
                            static_cast<double*>(to.data), count);
  } else {
    throw std::invalid_argument("input must be fp32 or fp64");
  }
}

}  // namespace fastopt
