#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "cuda/device.h"

namespace fastopt::cuda {

// The recurrence of one layer of an LSTM; products over all tokens are made before and after it.
// All tensors are on the device, contiguous and of the layer's dtype unless said otherwise; cells
// are of its arithmetic type. A token is one row at one step; tokens are numbered step by step, and
// the rows of a step never grow in number. G stands for the gates i, f, g, o of all units,
// [4, hidden]. Directions follow each other in memory.
struct LstmSteps {
  // [steps + 1] on the device: the first token of each step, and their number; nullptr where every
  // step has `batch` rows.
  const int64_t* first_token;
  int64_t steps, batch, tokens;
  int hidden;
  int directions;
};

constexpr int kMaxLstmDirections = 2;

// How persistent kernels spread over the device.
struct LstmGrid {
  int parts;      // the batch is cut into as many; 0: the kernel cannot serve
  int part_rows;  // the rows of a part; the last one may have fewer
  bool together;  // both directions at once
  // Blocks that share a product's columns and have a part of its depth each; 1: none do.
  int split;
};

// A layer whose weights stay in registers while all steps run.
struct LstmRecurrence {
  LstmSteps steps;
  DType dtype;
  bool tf32;  // fp32 is multiplied as tf32, on tensor cores
  LstmGrid grid;
  const void* weights[kMaxLstmDirections];  // [G, hidden]
  void* exchange;      // [2, directions, batch, exchange width], zeros: what blocks tell each other
  unsigned* counters;  // [lstm_counters()], zeros
};

struct LstmForwardRun {
  LstmRecurrence layer;
  void* gates;  // [directions, tokens, G], products of the inputs, with the biases; with save_gates
                // they become the gates after their activations
  bool save_gates;
  const void* initial_hidden;  // [directions, batch, hidden]
  void* cells;         // [directions, batch, hidden]: the initial ones become the final ones
  void* output;        // [tokens, directions, hidden]
  void* final_hidden;  // [directions, batch, hidden]
  void* saved_cells;   // [directions, tokens, hidden], or nullptr
};

struct LstmBackwardRun {
  LstmRecurrence layer;
  const void* gates;         // [directions, tokens, G], as the forward has left them
  const void* saved_cells;   // [directions, tokens, hidden]
  const void* initial_cell;  // [directions, batch, hidden], of the layer's dtype
  // Gradients with respect to the outputs; nullptr for zeros.
  const void* output_gradient;        // [tokens, directions, hidden]
  const void* final_hidden_gradient;  // [directions, batch, hidden]
  void* cell_gradient;  // [directions, batch, hidden], cells: the final ones' become the initial
                        // ones'
  void* gate_gradient;  // [directions, tokens, G], with respect to the pre-activations
  void* initial_hidden_gradient;  // [directions, batch, hidden]
  float* partial_sums;            // [lstm_partial_sums()], or nullptr where that is none
};

// Values in a row of `exchange`, for rows of so many values: hidden, or G in the backward pass.
int64_t lstm_exchange_width(DType dtype, int64_t values);

// What a grid asks for beside that.
int64_t lstm_counters(const LstmSteps& steps, const LstmGrid& grid);
int64_t lstm_partial_sums(const LstmSteps& steps, const LstmGrid& grid);

// Asks the device how many blocks it holds.
LstmGrid lstm_forward_grid(DType dtype, bool tf32, int64_t batch, int64_t hidden, int directions,
                           const Stream& stream);
LstmGrid lstm_backward_grid(DType dtype, bool tf32, int64_t batch, int64_t hidden, int directions,
                            const Stream& stream);

void launch_lstm_forward(const LstmForwardRun& run, const Stream& stream);
void launch_lstm_backward(const LstmBackwardRun& run, const Stream& stream);

// One step of one direction, around products that were made elsewhere. Tensors are [rows, ...] and
// contiguous, but for those with a stride, in elements.
struct LstmCellForward {
  DType dtype;
  int64_t rows, hidden;
  void* gates;          // [rows, G], as in LstmForwardRun
  const void* product;  // [rows, G], of the hidden state before and its weights
  bool save_gates;
  void* cells;        // [rows, hidden], before the step and after it
  void* saved_cells;  // [rows, hidden], or nullptr
  void* hidden_out;   // [rows, hidden], before any projection
  void* output;       // the same once more, or nullptr
  int64_t output_stride;
};

struct LstmCellBackward {
  DType dtype;
  int64_t rows, hidden;
  const void* gates;            // [rows, G], after their activations
  const void* cells;            // [rows, hidden], after the step
  const void* cells_before;     // [rows, hidden]
  const void* hidden_gradient;  // [rows, hidden]
  const void* output_gradient;  // added to it, or nullptr
  int64_t output_gradient_stride;
  void* cell_gradient;  // [rows, hidden], of the cells after the step and then of those before it
  void* gate_gradient;  // [rows, G]
  void* hidden_out;     // [rows, hidden]: the hidden state before its projection, or nullptr
};

void launch_lstm_cell_forward(const LstmCellForward& step, const Stream& stream);
void launch_lstm_cell_backward(const LstmCellBackward& step, const Stream& stream);

// Loads all kernels of a dtype on a device, so that none is loaded inside a graph's capture.
void load_lstm_kernels(DType dtype, int device);
void load_lstm_forward_kernels(DType dtype);
void load_lstm_backward_kernels(DType dtype);

}  // namespace fastopt::cuda
