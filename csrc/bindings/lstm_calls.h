#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fastopt {

// The tensors of one layer, as csrc/cpu/lstm.h has them. For each direction weight_ih, weight_hh,
// bias_ih, bias_hh and weight_hr; None stands for what is not there. `batch_sizes` belong to packed
// input [tokens, input_size]; without them it is [steps, batch, input_size].
struct LstmTensors {
  pybind11::object input;
  std::optional<std::vector<int64_t>> batch_sizes;
  pybind11::object initial_hidden, initial_cell;
  std::vector<pybind11::object> weights;
};

// All of these raise ValueError, before anything is written, where a tensor does not fit.

// `results` is output, final_hidden, final_cell, saved_gates, saved_cells; the last two may be
// None.
void lstm_forward(const LstmTensors& layer, pybind11::object packed,
                  const std::vector<pybind11::object>& results, int threads);

// Packed weights for lstm_forward: how many bytes for one direction, and into a tensor of
// [directions, bytes].
int64_t lstm_packed_bytes(const LstmTensors& layer);
void lstm_pack(const LstmTensors& layer, pybind11::object packed, int threads);

// `saved` is output, saved_gates, saved_cells, `gradients` those of output, final_hidden and
// final_cell, or None for zeros; `results` those of input ([directions, tokens, input_size], to be
// summed), initial_hidden and initial_cell and, for each direction, of the weights as in the layer.
void lstm_backward(const LstmTensors& layer, const std::vector<pybind11::object>& saved,
                   const std::vector<pybind11::object>& gradients,
                   const std::vector<pybind11::object>& results, int threads);

// f(input) into output, two contiguous tensors of fp32 or fp64: "exp", "sigmoid" or "tanh" as the
// kernels compute them.
void activate(const std::string& function, pybind11::object input, pybind11::object output);

}  // namespace fastopt
