#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/checked_tensor.h"
#include "cuda/lstm.h"

namespace fastopt {

// The steps of a layer and where its tensors are. All calls raise ValueError, before anything is
// written, where a tensor does not fit; csrc/cuda/lstm.h has the shapes, and which may be None.
struct CudaLstmLayer {
  DType dtype;
  Place place;
  cuda::LstmSteps steps;
  pybind11::object first_token;

  CudaLstmLayer(int dtype, int device_type, int device_index, int directions, int64_t step_count,
                int64_t batch, int64_t tokens, int64_t hidden, pybind11::object first_token);

  cuda::Stream stream(uintptr_t handle) const {
    return {place.device_index, reinterpret_cast<void*>(handle)};
  }
};

// Parts of the batch, rows of a part, both directions at once, blocks that share columns; no parts
// where the persistent kernel
// of the pass cannot serve.
using LstmGridTuple = std::tuple<int, int, bool, int>;
LstmGridTuple cuda_lstm_grid(const CudaLstmLayer& layer, bool backward, bool tf32);

int64_t cuda_lstm_exchange_width(const CudaLstmLayer& layer, bool backward);

// How many counters and partial sums a grid asks for.
std::pair<int64_t, int64_t> cuda_lstm_workspace(const CudaLstmLayer& layer,
                                                const LstmGridTuple& grid);

void cuda_lstm_forward(const CudaLstmLayer& layer, LstmGridTuple grid, bool tf32,
                       const std::vector<pybind11::object>& weights, pybind11::object exchange,
                       pybind11::object counters, pybind11::object gates, bool save_gates,
                       pybind11::object initial_hidden, pybind11::object cells,
                       pybind11::object output, pybind11::object final_hidden,
                       pybind11::object saved_cells, uintptr_t stream);

void cuda_lstm_backward(const CudaLstmLayer& layer, LstmGridTuple grid, bool tf32,
                        const std::vector<pybind11::object>& weights, pybind11::object exchange,
                        pybind11::object counters, pybind11::object gates,
                        pybind11::object saved_cells, pybind11::object initial_cell,
                        pybind11::object output_gradient, pybind11::object final_hidden_gradient,
                        pybind11::object cell_gradient, pybind11::object gate_gradient,
                        pybind11::object initial_hidden_gradient, pybind11::object partial_sums,
                        uintptr_t stream);

// One step of `rows` rows; output and its gradient may have any stride between rows.
void cuda_lstm_cell_forward(const CudaLstmLayer& layer, int64_t rows, pybind11::object gates,
                            pybind11::object product, bool save_gates, pybind11::object cells,
                            pybind11::object saved_cells, pybind11::object hidden_out,
                            pybind11::object output, uintptr_t stream);

void cuda_lstm_cell_backward(const CudaLstmLayer& layer, int64_t rows, pybind11::object gates,
                             pybind11::object cells, pybind11::object cells_before,
                             pybind11::object hidden_gradient, pybind11::object output_gradient,
                             pybind11::object cell_gradient, pybind11::object gate_gradient,
                             pybind11::object hidden_out, uintptr_t stream);

}  // namespace fastopt
