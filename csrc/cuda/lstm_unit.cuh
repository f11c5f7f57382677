#pragma once

// One unit at one token, from memory to memory: what the persistent and the step kernels share.

#include "core/lstm_cell.h"
#include "cuda/launch.cuh"

namespace fastopt::cuda {

// `row` is the four gates of all units at one token, [4, hidden].
template <class Storage>
__device__ LstmGates<ComputeType<Storage>> load_gates(const Storage* row, int64_t hidden,
                                                      int64_t unit) {
  return {load(row + unit), load(row + hidden + unit), load(row + 2 * hidden + unit),
          load(row + 3 * hidden + unit)};
}

template <class Storage>
__device__ void store_gates(Storage* row, int64_t hidden, int64_t unit,
                            const LstmGates<ComputeType<Storage>>& gates) {
  store(row + unit, gates.input);
  store(row + hidden + unit, gates.forget);
  store(row + 2 * hidden + unit, gates.cell);
  store(row + 3 * hidden + unit, gates.output);
}

template <class T>
__device__ LstmGates<T> operator+(const LstmGates<T>& a, const LstmGates<T>& b) {
  return {a.input + b.input, a.forget + b.forget, a.cell + b.cell, a.output + b.output};
}

template <class T>
struct LstmUnit {
  LstmGates<T> gates;  // after their activations
  T cell, hidden;
};

template <class T>
__device__ LstmUnit<T> step_unit(const LstmGates<T>& pre, T cell_before) {
  LstmUnit<T> unit;
  unit.gates = activated<T>(pre);
  unit.cell = next_cell(unit.gates, cell_before);
  unit.hidden = hidden_of<T>(unit.gates, unit.cell);
  return unit;
}

}  // namespace fastopt::cuda
