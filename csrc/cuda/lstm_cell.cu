// One step of an LSTM whose products torch makes: projections, fp64, and layers that are too large
// for the persistent kernels.

#include "core/with_storage.h"
#include "cuda/lstm.h"
#include "cuda/lstm_recurrence.cuh"

namespace fastopt::cuda {

namespace {

constexpr int kThreads = 256;

template <class Storage>
__global__ void __launch_bounds__(kThreads) lstm_cell_forward_kernel(const LstmCellForward step) {
  using T = ComputeType<Storage>;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= step.rows * step.hidden) return;
  const int64_t row = element / step.hidden, unit = element % step.hidden;
  Storage* gates = static_cast<Storage*>(step.gates) + row * 4 * step.hidden;
  const Storage* product = static_cast<const Storage*>(step.product) + row * 4 * step.hidden;
  T* cell = static_cast<T*>(step.cells) + element;
  const LstmUnit<T> now = step_unit<T>(
      load_gates(gates, step.hidden, unit) + load_gates(product, step.hidden, unit), *cell);
  *cell = now.cell;
  if (step.save_gates) store_gates(gates, step.hidden, unit, now.gates);
  if (step.saved_cells) static_cast<T*>(step.saved_cells)[element] = now.cell;
  store(static_cast<Storage*>(step.hidden_out) + element, now.hidden);
  if (step.output) {
    store(static_cast<Storage*>(step.output) + row * step.output_stride + unit, now.hidden);
  }
}

template <class Storage>
__global__ void __launch_bounds__(kThreads) lstm_cell_backward_kernel(const LstmCellBackward step) {
  using T = ComputeType<Storage>;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= step.rows * step.hidden) return;
  const int64_t row = element / step.hidden, unit = element % step.hidden;
  const Storage* gates = static_cast<const Storage*>(step.gates) + row * 4 * step.hidden;
  T hidden_gradient = load(static_cast<const Storage*>(step.hidden_gradient) + element);
  if (step.output_gradient) {
    hidden_gradient += load(static_cast<const Storage*>(step.output_gradient) +
                            row * step.output_gradient_stride + unit);
  }
  T* cell_gradient_at = static_cast<T*>(step.cell_gradient) + element;
  const LstmCellGradient<T> gradient = cell_gradient<T>(
      load_gates(gates, step.hidden, unit), static_cast<const T*>(step.cells_before)[element],
      static_cast<const T*>(step.cells)[element], hidden_gradient, *cell_gradient_at);
  *cell_gradient_at = gradient.cell_before;
  store_gates(static_cast<Storage*>(step.gate_gradient) + row * 4 * step.hidden, step.hidden, unit,
              gradient.pre);
  if (step.hidden_out) store(static_cast<Storage*>(step.hidden_out) + element, gradient.hidden);
}

LaunchShape shape_of(int64_t rows, int64_t hidden) {
  return {(rows * hidden + kThreads - 1) / kThreads, kThreads};
}

}  // namespace

int64_t lstm_exchange_width(DType dtype, int64_t values) {
  int64_t width = 0;
  with_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    width = int64_t{groups_of<Storage>(values)} * kGroup<Storage>;
  });
  return width;
}

int64_t lstm_counters(const LstmSteps& steps, const LstmGrid& grid) {
  const int64_t teams = int64_t{steps.directions} * grid.parts;
  const int64_t families = blocks_of_units(steps.hidden, grid.split) / grid.split;
  return teams * (grid.split > 1 ? 1 + families : 1);
}

int64_t lstm_partial_sums(const LstmSteps& steps, const LstmGrid& grid) {
  if (grid.split == 1) return 0;
  return int64_t{steps.directions} * blocks_of_units(steps.hidden, grid.split) * steps.batch *
         kUnits * grid.split;
}

void load_lstm_kernels(DType dtype, int device) {
#if !defined(FASTOPT_HOST_SIM)
  const DeviceGuard guard(device);
#else
  (void)device;
#endif
  load_lstm_forward_kernels(dtype);
  load_lstm_backward_kernels(dtype);
  with_storage(dtype, [](auto storage) {
    load_kernel(lstm_cell_forward_kernel<decltype(storage)>);
    load_kernel(lstm_cell_backward_kernel<decltype(storage)>);
  });
}

void launch_lstm_cell_forward(const LstmCellForward& step, const Stream& stream) {
  with_storage(step.dtype, [&](auto storage) {
    launch("lstm_cell_forward_kernel", stream, shape_of(step.rows, step.hidden),
           lstm_cell_forward_kernel<decltype(storage)>, step);
  });
}

void launch_lstm_cell_backward(const LstmCellBackward& step, const Stream& stream) {
  with_storage(step.dtype, [&](auto storage) {
    launch("lstm_cell_backward_kernel", stream, shape_of(step.rows, step.hidden),
           lstm_cell_backward_kernel<decltype(storage)>, step);
  });
}

}  // namespace fastopt::cuda
