#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fastopt {

// One layer of an LSTM on the CPU. `sizes` is (directions, steps, batch, tokens, input, hidden,
// output, input_step_stride, input_row_stride); `layer` is (input, initial_hidden, initial_cell)
// and for each direction (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr). None stands for what
// is not there. The caller vouches for dtypes, shapes and strides; csrc/cpu/lstm.h has them.
// `results` is (output, final_hidden, final_cell, saved_gates, saved_cells).
void lstm_forward(const std::vector<int64_t>& sizes, const std::vector<int64_t>& batch_sizes,
                  pybind11::tuple layer, pybind11::object packed, pybind11::tuple results,
                  int threads);

// Packed weights for lstm_forward: how many bytes for one direction, and into a tensor of
// [directions, bytes].
int64_t lstm_packed_bytes(const std::vector<int64_t>& sizes, pybind11::tuple layer);
void lstm_pack(const std::vector<int64_t>& sizes, pybind11::tuple layer, pybind11::object packed,
               int threads);

// `saved` is (output, saved_gates, saved_cells), `gradients` those of output, final_hidden and
// final_cell; `results` those of input, initial_hidden and initial_cell and for each direction of
// weight_ih, weight_hh, bias and weight_hr.
void lstm_backward(const std::vector<int64_t>& sizes, const std::vector<int64_t>& batch_sizes,
                   pybind11::tuple layer, pybind11::tuple saved, pybind11::tuple gradients,
                   pybind11::tuple results, int threads);

// f(input) into output, two contiguous tensors of fp32 or fp64: "exp", "sigmoid" or "tanh" as the
// kernels compute them.
void activate(const std::string& function, pybind11::object input, pybind11::object output);

}  // namespace fastopt
