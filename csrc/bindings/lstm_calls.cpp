#include "bindings/lstm_calls.h"

#include <optional>
#include <stdexcept>

#include "bindings/checked_tensor.h"
#include "cpu/dispatch.h"
#include "cpu/lstm_schedule.h"

namespace py = pybind11;

namespace fastopt {

namespace {

// The weights of a direction, or their gradients: weight_ih, weight_hh, bias_ih, bias_hh,
// weight_hr.
constexpr int kWeights = 5;

// A layer of tensors that fit each other.
struct CheckedLayer {
  LstmSchedule schedule;
  DType dtype;
  LstmLayer layer{};

  CheckedLayer(const LstmTensors& given, int threads)
      : schedule(steps_of(given)), dtype(dtype_of(given)) {
    const auto hidden = described(given.initial_hidden, "initial_hidden");
    const auto cell = described(given.initial_cell, "initial_cell");
    const auto input = described(given.input, "input");
    if (hidden.dims != 3 || cell.dims != 3 || hidden.sizes[0] < 1 ||
        hidden.sizes[0] > kMaxDirections) {
      throw std::invalid_argument("initial states must be of shape [1 or 2, batch, features]");
    }
    layer.dtype = dtype;
    layer.threads = threads;
    layer.directions = static_cast<int>(hidden.sizes[0]);
    layer.batch = hidden.sizes[1];
    layer.output_size = hidden.sizes[2];
    layer.hidden_size = cell.sizes[2];
    layer.steps = static_cast<int64_t>(schedule.batch_sizes.size());
    layer.tokens = schedule.first_token.back();
    layer.batch_sizes = schedule.batch_sizes.data();
    layer.first_token = schedule.first_token.data();
    layer.chunks = schedule.chunks.data();
    layer.chunk_count = static_cast<int64_t>(schedule.chunks.size()) - 1;
    layer.chunk_rows = schedule.chunk_rows;
    set_input(input, given);
    layer.initial_hidden = present(given.initial_hidden, "initial_hidden",
                                   {layer.directions, layer.batch, layer.output_size}, dtype);
    layer.initial_cell = present(given.initial_cell, "initial_cell",
                                 {layer.directions, layer.batch, layer.hidden_size}, dtype);
    if (given.weights.size() != static_cast<size_t>(kWeights * layer.directions)) {
      throw std::invalid_argument("weights must be five for each direction");
    }
    for (int i = 0; i < layer.directions; ++i) {
      const py::object* own = &given.weights[kWeights * i];
      layer.weights[i] = {present(own[0], "weight_ih", input_weights(), dtype),
                          present(own[1], "weight_hh", hidden_weights(), dtype),
                          address(own[2], "bias_ih", biases(), dtype),
                          address(own[3], "bias_hh", biases(), dtype),
                          address(own[4], "weight_hr", projection(), dtype)};
      const bool one_bias = own[2].is_none() != own[3].is_none();
      if (one_bias || (own[4].is_none() && layer.output_size != layer.hidden_size)) {
        throw std::invalid_argument("a bias or weight_hr is missing");
      }
    }
  }

  Sizes input_weights() const { return {4 * layer.hidden_size, layer.input_size}; }
  Sizes hidden_weights() const { return {4 * layer.hidden_size, layer.output_size}; }
  Sizes biases() const { return {4 * layer.hidden_size}; }
  Sizes projection() const { return {layer.output_size, layer.hidden_size}; }
  Sizes saved(int64_t width) const { return {layer.directions, layer.tokens, width}; }

  // Of a tensor like the input, with other features.
  Sizes tokens(int64_t features) const {
    return layer.packed_input ? Sizes{layer.tokens, features}
                              : Sizes{layer.steps, layer.batch, features};
  }

 private:
  static DType dtype_of(const LstmTensors& given) {
    const std::optional<DType> dtype = real_dtype_of(described(given.input, "input"));
    if (!dtype) throw std::invalid_argument("no kernel has the dtype of the input");
    return *dtype;
  }

  static LstmSchedule steps_of(const LstmTensors& given) {
    if (given.batch_sizes) return LstmSchedule(*given.batch_sizes);
    const auto input = described(given.input, "input");
    if (input.dims != 3) throw std::invalid_argument("input must be [steps, batch, features]");
    return LstmSchedule(Sizes(input.sizes[0], input.sizes[1]));
  }

  void set_input(const torch_access::Description& input, const LstmTensors& given) {
    layer.packed_input = given.batch_sizes.has_value();
    const int dims = layer.packed_input ? 2 : 3;
    if (input.dims != dims || (input.sizes[dims - 1] > 1 && input.strides[dims - 1] != 1)) {
      throw std::invalid_argument("input must have contiguous features");
    }
    int64_t most = layer.batch;
    for (int64_t rows : schedule.batch_sizes) {
      if (rows < 1 || rows > most) {
        throw std::invalid_argument("batch_sizes must be positive and must not grow");
      }
      most = rows;
    }
    if (layer.steps > 0 && schedule.batch_sizes[0] != layer.batch) {
      throw std::invalid_argument("batch_sizes must begin with the batch of the states");
    }
    if (layer.packed_input && input.sizes[0] != layer.tokens) {
      throw std::invalid_argument("batch_sizes must sum to the tokens of the input");
    }
    layer.input = input.data;
    layer.input_size = input.sizes[dims - 1];
    layer.input_step_stride = layer.packed_input ? 0 : input.strides[0];
    layer.input_row_stride = input.strides[dims - 2];
  }
};

// Memory of [directions, packed_bytes].
void* packed_memory(py::handle packed, const LstmLayer& layer) {
  const torch_access::Description given = described(packed, "packed");
  const int64_t bytes = chosen_instruction_set().lstm->packed_bytes(layer);
  if (given.dims != 2 || given.sizes[0] != layer.directions || given.sizes[1] != bytes ||
      given.strides[0] != bytes || given.strides[1] != 1 || given.dtype.bits != 8) {
    throw std::invalid_argument("packed must be what was packed of these weights");
  }
  return given.data;
}

}  // namespace

void lstm_forward(const LstmTensors& given, py::object packed, const std::vector<py::object>& out,
                  int threads) {
  const CheckedLayer checked(given, threads);
  const LstmLayer& layer = checked.layer;
  const LstmKernels& kernels = *chosen_instruction_set().lstm;
  if (out.size() != 5) throw std::invalid_argument("results must be five");
  LstmForward call{};
  call.layer = layer;
  if (!packed.is_none()) call.packed = packed_memory(packed, layer);
  const int64_t directions = layer.directions;
  call.output =
      present(out[0], "output", checked.tokens(directions * layer.output_size), checked.dtype);
  call.final_hidden =
      present(out[1], "final_hidden", {directions, layer.batch, layer.output_size}, checked.dtype);
  call.final_cell =
      present(out[2], "final_cell", {directions, layer.batch, layer.hidden_size}, checked.dtype);
  call.saved_gates =
      address(out[3], "saved_gates", checked.saved(4 * layer.hidden_size), checked.dtype);
  call.saved_cells = address(out[4], "saved_cells", checked.saved(layer.hidden_size),
                             compute_dtype(checked.dtype));
  py::gil_scoped_release released;
  kernels.forward(call);
}

int64_t lstm_packed_bytes(const LstmTensors& given) {
  return chosen_instruction_set().lstm->packed_bytes(CheckedLayer(given, 1).layer);
}

void lstm_pack(const LstmTensors& given, py::object packed, int threads) {
  const CheckedLayer checked(given, threads);
  chosen_instruction_set().lstm->pack(checked.layer, packed_memory(packed, checked.layer));
}

void lstm_backward(const LstmTensors& given, const std::vector<py::object>& saved,
                   const std::vector<py::object>& gradients, const std::vector<py::object>& out,
                   int threads) {
  const CheckedLayer checked(given, threads);
  const LstmLayer& layer = checked.layer;
  const DType dtype = checked.dtype;
  if (saved.size() != 3 || gradients.size() != 3 ||
      out.size() != static_cast<size_t>(3 + kWeights * layer.directions)) {
    throw std::invalid_argument("saved and gradients must be three, results 3 and five each");
  }
  const Sizes output = checked.tokens(layer.directions * layer.output_size);
  const Sizes hidden{layer.directions, layer.batch, layer.output_size};
  const Sizes cell{layer.directions, layer.batch, layer.hidden_size};
  LstmBackward call{};
  call.layer = layer;
  call.output = present(saved[0], "output", output, dtype);
  call.saved_gates = present(saved[1], "saved_gates", checked.saved(4 * layer.hidden_size), dtype);
  call.saved_cells =
      present(saved[2], "saved_cells", checked.saved(layer.hidden_size), compute_dtype(dtype));
  call.output_gradient = address(gradients[0], "gradient of output", output, dtype);
  call.final_hidden_gradient = address(gradients[1], "gradient of final_hidden", hidden, dtype);
  call.final_cell_gradient = address(gradients[2], "gradient of final_cell", cell, dtype);
  call.input_gradient =
      address(out[0], "gradient of input", checked.saved(layer.input_size), dtype);
  call.initial_hidden_gradient = address(out[1], "gradient of initial_hidden", hidden, dtype);
  call.initial_cell_gradient = address(out[2], "gradient of initial_cell", cell, dtype);
  for (int i = 0; i < layer.directions; ++i) {
    const py::object* own = &out[3 + kWeights * i];
    call.weights[i] = {address(own[0], "gradient of weight_ih", checked.input_weights(), dtype),
                       address(own[1], "gradient of weight_hh", checked.hidden_weights(), dtype),
                       address(own[2], "gradient of bias_ih", checked.biases(), dtype),
                       address(own[3], "gradient of bias_hh", checked.biases(), dtype),
                       address(own[4], "gradient of weight_hr", checked.projection(), dtype)};
  }
  py::gil_scoped_release released;
  chosen_instruction_set().lstm->backward(call);
}

void activate(const std::string& function, py::object input, py::object output) {
  if (function != "exp" && function != "sigmoid" && function != "tanh") {
    throw std::invalid_argument("function must be exp, sigmoid or tanh, got " + function);
  }
  const torch_access::Description from = described(input, "input");
  const std::optional<DType> dtype = real_dtype_of(from);
  const Sizes sizes(from.sizes, from.sizes + from.dims);
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  const LstmKernels& kernels = *chosen_instruction_set().lstm;
  if (dtype == DType::kFloat32) {
    kernels.activate_float(function[0], static_cast<float*>(present(input, "input", sizes, *dtype)),
                           static_cast<float*>(present(output, "output", sizes, *dtype)), count);
  } else if (dtype == DType::kFloat64) {
    kernels.activate_double(function[0],
                            static_cast<double*>(present(input, "input", sizes, *dtype)),
                            static_cast<double*>(present(output, "output", sizes, *dtype)), count);
  } else {
    throw std::invalid_argument("input must be fp32 or fp64");
  }
}

}  // namespace fastopt
