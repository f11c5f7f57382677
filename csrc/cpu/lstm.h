#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastopt {

constexpr int kMaxDirections = 2;

// One layer of an LSTM over sequences of `batch` rows. All tensors have the same dtype and are
// contiguous unless a stride says otherwise; strides are in elements. A token is one row at one
// step: step t has batch_sizes[t] of them, which never grows with t, and tokens are numbered step
// by step. G stands for the four gates i, f, g, o of all units, [4, hidden].
struct LstmLayer {
  DType dtype;
  int threads;
  int directions;
  int64_t steps, batch, tokens;
  // Of an LstmSchedule: that is not for code of an instruction set, which shares no functions.
  const int64_t* batch_sizes;  // [steps]
  const int64_t* first_token;  // [steps + 1]
  const int64_t* chunks;       // [chunk_count + 1]
  int64_t chunk_count, chunk_rows;
  int64_t input_size, hidden_size, output_size;  // output_size is hidden_size without a projection
  // Row b of step t, or of a packed input token n, is contiguous and begins at
  // t * input_step_stride + b * input_row_stride, or at n * input_row_stride.
  const void* input;
  bool packed_input;
  int64_t input_step_stride, input_row_stride;
  const void* initial_hidden;  // [directions, batch, output_size]
  const void* initial_cell;    // [directions, batch, hidden_size]
  struct Weights {
    const void* input;       // [G, input_size]
    const void* hidden;      // [G, output_size]
    const void* input_bias;  // [G], or nullptr
    const void* hidden_bias;
    const void* projection;  // [output_size, hidden_size], or nullptr
  } weights[kMaxDirections];
};

struct LstmForward {
  LstmLayer layer;
  const void* packed;  // [directions, packed_bytes], made by pack; or nullptr
  void* output;        // [tokens, directions, output_size]
  void* final_hidden;  // as the initial ones
  void* final_cell;
  // What the backward needs; nullptr where there will be none.
  void* saved_gates;  // [directions, tokens, G], after their activations
  void* saved_cells;  // [directions, tokens, hidden_size], in the type of the arithmetic
};

struct LstmBackward {
  LstmLayer layer;
  const void* output;
  const void* saved_gates;
  const void* saved_cells;
  // Gradients with respect to the outputs; nullptr for zeros.
  const void* output_gradient;
  const void* final_hidden_gradient;
  const void* final_cell_gradient;
  // Gradients to be written; nullptr for those that nobody wants.
  void* input_gradient;           // [tokens, input_size]
  void* initial_hidden_gradient;  // as the initial states
  void* initial_cell_gradient;
  struct Weights {
    void* input;
    void* hidden;
    void* input_bias;
    void* hidden_bias;
    void* projection;
  } weights[kMaxDirections];
};

// What one instruction set offers.
struct LstmKernels {
  void (*forward)(const LstmForward& call);
  // Weights as the forward pass reads them, for callers whose weights do not change.
  int64_t (*packed_bytes)(const LstmLayer& layer);  // of one direction
  void (*pack)(const LstmLayer& layer, void* packed);
  void (*backward)(const LstmBackward& call);
  // f(x) for `count` values, as the kernels compute it: exp, sigmoid or tanh.
  void (*activate_float)(char function, const float* x, float* y, int64_t count);
  void (*activate_double)(char function, const double* x, double* y, int64_t count);
  // Multiplications and additions per second of all threads together, in fp32, with what they need
  // in registers and the L1 cache.
  double (*fma_rate)(int threads);
};

}  // namespace fastopt
