#include "bindings/cuda_lstm_calls.h"

#include <stdexcept>
#include <utility>

#include "bindings/simulated_memory.h"

namespace py = pybind11;

namespace fastopt {

namespace {

using torch_access::DLDataType;

// Looks tensors up, and keeps what the simulator has to know: which memory blocks write.
class Tensors {
 public:
  explicit Tensors(const CudaLstmLayer& layer) : layer_(layer) {}

  // Of the layer's dtype; nullptr for None.
  void* optional(py::handle tensor, const char* name, const Sizes& sizes) {
    return address(tensor, name, sizes, layer_.dtype, layer_.place);
  }
  void* read(py::handle tensor, const char* name, const Sizes& sizes) {
    return present(tensor, name, sizes, layer_.dtype, layer_.place);
  }
  void* written(py::handle tensor, const char* name, const Sizes& sizes) {
    return written(tensor, name, sizes, layer_.dtype);
  }
  // Of the type of the arithmetic.
  void* read_cells(py::handle tensor, const char* name, const Sizes& sizes) {
    return present(tensor, name, sizes, compute_dtype(layer_.dtype), layer_.place);
  }
  void* written_cells(py::handle tensor, const char* name, const Sizes& sizes) {
    return written(tensor, name, sizes, compute_dtype(layer_.dtype));
  }
  // [rows, columns] with any stride between the rows; nullptr for None.
  void* rows(py::handle tensor, const char* name, const Sizes& sizes, int64_t& stride) {
    if (tensor.is_none()) return nullptr;
    const torch_access::Description given = described(tensor, name, layer_.place);
    if (real_dtype_of(given) != layer_.dtype || !has_sizes(given, sizes, true)) {
      throw std::invalid_argument(std::string(name) + " must have contiguous rows, be of shape " +
                                  shape_text(sizes) + " and of the layer's dtype");
    }
    stride = given.strides[0];
    return given.data;
  }
  void* integers(py::handle tensor, const char* name, int64_t count, uint8_t bits) {
    const torch_access::Description given = described(tensor, name, layer_.place);
    if (given.dtype != DLDataType{torch_access::kDLInt, bits, 1} || !has_sizes(given, {count})) {
      throw std::invalid_argument(std::string(name) + " must be contiguous integers of shape " +
                                  shape_text(Sizes{count}));
    }
    return given.data;
  }
  unsigned* counters(py::handle tensor, const char* name, int64_t count) {
    void* const data = integers(tensor, name, count, 32);
    extents_.emplace_back(data, count * 4, extents_.size());
    return static_cast<unsigned*>(data);
  }

  SimulatedMemory simulated() { return SimulatedMemory(std::move(extents_)); }

 private:
  void* written(py::handle tensor, const char* name, const Sizes& sizes, DType dtype) {
    void* const data = present(tensor, name, sizes, dtype, layer_.place);
    int64_t bytes = bytes_of(dtype);
    for (int64_t size : sizes) bytes *= size;
    extents_.emplace_back(data, bytes, extents_.size());
    return data;
  }

  const CudaLstmLayer& layer_;
  std::vector<Extent> extents_;
};

cuda::LstmGrid grid_from(const LstmGridTuple& grid) {
  return {std::get<0>(grid), std::get<1>(grid), std::get<2>(grid), std::get<3>(grid)};
}

cuda::LstmRecurrence recurrence_of(const CudaLstmLayer& layer, const LstmGridTuple& grid, bool tf32,
                                   const std::vector<py::object>& weights, py::handle exchange,
                                   py::handle counters, bool backward, Tensors& tensors) {
  cuda::LstmRecurrence recurrence{};
  const cuda::LstmSteps& steps = recurrence.steps = layer.steps;
  if (layer.dtype == DType::kFloat64) {
    throw std::invalid_argument("the persistent kernels have no fp64");
  }
  recurrence.dtype = layer.dtype;
  recurrence.tf32 = tf32;
  recurrence.grid = grid_from(grid);
  const cuda::LstmGrid& spread = recurrence.grid;
  if (spread.parts < 1 || spread.part_rows < 1 || spread.split < 1 ||
      int64_t{spread.parts} * spread.part_rows < steps.batch) {
    throw std::invalid_argument("the grid must be one that lstm_grid has given");
  }
  if (weights.size() != static_cast<size_t>(steps.directions)) {
    throw std::invalid_argument("weight_hh must be one for each direction");
  }
  for (int i = 0; i < steps.directions; ++i) {
    recurrence.weights[i] =
        tensors.read(weights[i], "weight_hh", {4 * int64_t{steps.hidden}, steps.hidden});
  }
  recurrence.exchange = tensors.written(
      exchange, "exchange",
      {2, steps.directions, steps.batch, cuda_lstm_exchange_width(layer, backward)});
  if (reinterpret_cast<uintptr_t>(recurrence.exchange) % 16 != 0) {
    throw std::invalid_argument("exchange must be aligned to 16 bytes");
  }
  recurrence.counters = tensors.counters(counters, "counters", cuda::lstm_counters(steps, spread));
  return recurrence;
}

}  // namespace

CudaLstmLayer::CudaLstmLayer(int dtype, int device_type, int device_index, int directions,
                             int64_t step_count, int64_t batch, int64_t tokens, int64_t hidden,
                             py::object first_token)
    : dtype(static_cast<DType>(dtype)),
      place{device_type, device_index},
      steps{nullptr, step_count, batch, tokens, static_cast<int>(hidden), directions},
      first_token(std::move(first_token)) {
  if (dtype < 0 || dtype >= kDTypes) throw std::invalid_argument("no kernel has this dtype");
  const bool is_small = hidden <= INT32_MAX / 8 && batch <= INT32_MAX / 8;
  if (directions < 1 || directions > cuda::kMaxLstmDirections || step_count < 1 || batch < 1 ||
      hidden < 1 || tokens < batch || tokens > step_count * batch || !is_small) {
    throw std::invalid_argument("a layer needs 1 or 2 directions, steps, rows, units and tokens");
  }
  if (!this->first_token.is_none()) {
    Tensors tensors(*this);
    steps.first_token = static_cast<const int64_t*>(
        tensors.integers(this->first_token, "first_token", step_count + 1, 64));
  } else if (tokens != step_count * batch) {
    throw std::invalid_argument("without first_token, every step has all rows");
  }
}

LstmGridTuple cuda_lstm_grid(const CudaLstmLayer& layer, bool backward, bool tf32) {
  const auto ask = backward ? cuda::lstm_backward_grid : cuda::lstm_forward_grid;
  const cuda::LstmGrid grid = ask(layer.dtype, tf32, layer.steps.batch, layer.steps.hidden,
                                  layer.steps.directions, layer.stream(0));
  return {grid.parts, grid.part_rows, grid.together, grid.split};
}

std::pair<int64_t, int64_t> cuda_lstm_workspace(const CudaLstmLayer& layer,
                                                const LstmGridTuple& grid) {
  return {cuda::lstm_counters(layer.steps, grid_from(grid)),
          cuda::lstm_partial_sums(layer.steps, grid_from(grid))};
}

int64_t cuda_lstm_exchange_width(const CudaLstmLayer& layer, bool backward) {
  return cuda::lstm_exchange_width(layer.dtype, (backward ? 4 : 1) * int64_t{layer.steps.hidden});
}

void cuda_lstm_forward(const CudaLstmLayer& layer, LstmGridTuple grid, bool tf32,
                       const std::vector<py::object>& weights, py::object exchange,
                       py::object counters, py::object gates, bool save_gates,
                       py::object initial_hidden, py::object cells, py::object output,
                       py::object final_hidden, py::object saved_cells, uintptr_t stream) {
  Tensors tensors(layer);
  const cuda::LstmSteps& steps = layer.steps;
  const int64_t hidden = steps.hidden, directions = steps.directions;
  const Sizes states{directions, steps.batch, hidden};
  cuda::LstmForwardRun run{};
  run.layer = recurrence_of(layer, grid, tf32, weights, exchange, counters, false, tensors);
  run.gates = tensors.written(gates, "gates", {directions, steps.tokens, 4 * hidden});
  run.save_gates = save_gates;
  run.initial_hidden = tensors.read(initial_hidden, "initial_hidden", states);
  run.cells = tensors.written_cells(cells, "cells", states);
  run.output = tensors.written(output, "output", {steps.tokens, directions * hidden});
  run.final_hidden = tensors.written(final_hidden, "final_hidden", states);
  if (!saved_cells.is_none()) {
    run.saved_cells =
        tensors.written_cells(saved_cells, "saved_cells", {directions, steps.tokens, hidden});
  }
  py::gil_scoped_release released;
  [[maybe_unused]] const SimulatedMemory memory = tensors.simulated();
  cuda::launch_lstm_forward(run, layer.stream(stream));
}

void cuda_lstm_backward(const CudaLstmLayer& layer, LstmGridTuple grid, bool tf32,
                        const std::vector<py::object>& weights, py::object exchange,
                        py::object counters, py::object gates, py::object saved_cells,
                        py::object initial_cell, py::object output_gradient,
                        py::object final_hidden_gradient, py::object cell_gradient,
                        py::object gate_gradient, py::object initial_hidden_gradient,
                        py::object partial_sums, uintptr_t stream) {
  Tensors tensors(layer);
  const cuda::LstmSteps& steps = layer.steps;
  const int64_t hidden = steps.hidden, directions = steps.directions;
  const Sizes states{directions, steps.batch, hidden};
  const Sizes all_gates{directions, steps.tokens, 4 * hidden};
  cuda::LstmBackwardRun run{};
  run.layer = recurrence_of(layer, grid, tf32, weights, exchange, counters, true, tensors);
  run.gates = tensors.read(gates, "gates", all_gates);
  run.saved_cells =
      tensors.read_cells(saved_cells, "saved_cells", {directions, steps.tokens, hidden});
  run.initial_cell = tensors.read(initial_cell, "initial_cell", states);
  run.output_gradient =
      tensors.optional(output_gradient, "gradient of output", {steps.tokens, directions * hidden});
  run.final_hidden_gradient =
      tensors.optional(final_hidden_gradient, "gradient of final_hidden", states);
  run.cell_gradient = tensors.written_cells(cell_gradient, "gradient of cells", states);
  run.gate_gradient = tensors.written(gate_gradient, "gradient of gates", all_gates);
  run.initial_hidden_gradient =
      tensors.written(initial_hidden_gradient, "gradient of initial_hidden", states);
  if (const int64_t sums = cuda::lstm_partial_sums(steps, run.layer.grid); sums > 0) {
    run.partial_sums =
        static_cast<float*>(tensors.written_cells(partial_sums, "partial_sums", {sums}));
  }
  py::gil_scoped_release released;
  [[maybe_unused]] const SimulatedMemory memory = tensors.simulated();
  cuda::launch_lstm_backward(run, layer.stream(stream));
}

void cuda_lstm_cell_forward(const CudaLstmLayer& layer, int64_t rows, py::object gates,
                            py::object product, bool save_gates, py::object cells,
                            py::object saved_cells, py::object hidden_out, py::object output,
                            uintptr_t stream) {
  Tensors tensors(layer);
  const int64_t hidden = layer.steps.hidden;
  const Sizes all_gates{rows, 4 * hidden}, units{rows, hidden};
  cuda::LstmCellForward step{};
  step.dtype = layer.dtype;
  step.rows = rows;
  step.hidden = hidden;
  step.gates = tensors.read(gates, "gates", all_gates);
  step.product = tensors.read(product, "product", all_gates);
  step.save_gates = save_gates;
  step.cells = tensors.read_cells(cells, "cells", units);
  if (!saved_cells.is_none()) {
    step.saved_cells = tensors.read_cells(saved_cells, "saved_cells", units);
  }
  step.hidden_out = tensors.read(hidden_out, "hidden_out", units);
  step.output = tensors.rows(output, "output", units, step.output_stride);
  py::gil_scoped_release released;
  cuda::launch_lstm_cell_forward(step, layer.stream(stream));
}

void cuda_lstm_cell_backward(const CudaLstmLayer& layer, int64_t rows, py::object gates,
                             py::object cells, py::object cells_before, py::object hidden_gradient,
                             py::object output_gradient, py::object cell_gradient,
                             py::object gate_gradient, py::object hidden_out, uintptr_t stream) {
  Tensors tensors(layer);
  const int64_t hidden = layer.steps.hidden;
  const Sizes all_gates{rows, 4 * hidden}, units{rows, hidden};
  cuda::LstmCellBackward step{};
  step.dtype = layer.dtype;
  step.rows = rows;
  step.hidden = hidden;
  step.gates = tensors.read(gates, "gates", all_gates);
  step.cells = tensors.read_cells(cells, "cells", units);
  step.cells_before = tensors.read_cells(cells_before, "cells_before", units);
  step.hidden_gradient = tensors.read(hidden_gradient, "gradient of hidden", units);
  step.output_gradient =
      tensors.rows(output_gradient, "gradient of output", units, step.output_gradient_stride);
  step.cell_gradient = tensors.read_cells(cell_gradient, "gradient of cells", units);
  step.gate_gradient = tensors.read(gate_gradient, "gradient of gates", all_gates);
  step.hidden_out = tensors.optional(hidden_out, "hidden_out", units);
  py::gil_scoped_release released;
  cuda::launch_lstm_cell_backward(step, layer.stream(stream));
}

}  // namespace fastopt
