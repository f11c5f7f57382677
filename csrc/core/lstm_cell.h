#pragma once

#include "core/activations.h"

FASTOPT_BEGIN_NAMESPACE

// One unit of an LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000),
// as torch.nn.LSTM defines it:
//   i, f, o = sigmoid(pre-activations)   g = tanh(pre-activation)
//   c = f * c_before + i * g             h = o * tanh(c)
// V is a scalar T or a vector of them.
template <class V>
struct LstmGates {
  V input, forget, cell, output;  // in torch's order
};

template <class T, class V>
HOST_DEVICE LstmGates<V> activated(const LstmGates<V>& pre) {
  return {sigmoid<T>(pre.input), sigmoid<T>(pre.forget), hyperbolic_tangent<T>(pre.cell),
          sigmoid<T>(pre.output)};
}

template <class V>
HOST_DEVICE V next_cell(const LstmGates<V>& gates, V cell_before) {
  return gates.forget * cell_before + gates.input * gates.cell;
}

template <class T, class V>
HOST_DEVICE V hidden_of(const LstmGates<V>& gates, V cell) {
  return gates.output * hyperbolic_tangent<T>(cell);
}

template <class V>
struct LstmCellGradient {
  LstmGates<V> pre;  // of the loss with respect to the pre-activations
  V cell_before;
  V hidden;  // not a gradient: o * tanh(c), which a projection's gradient needs
};

// `hidden` and `cell` are gradients with respect to h and to c, from outside this unit.
template <class T, class V>
HOST_DEVICE LstmCellGradient<V> cell_gradient(const LstmGates<V>& gates, V cell_before, V cell_now,
                                              V hidden, V cell) {
  const V one = V{} + T(1);
  const V tanh_cell = hyperbolic_tangent<T>(cell_now);
  const V through_cell = cell + hidden * gates.output * (one - tanh_cell * tanh_cell);
  LstmCellGradient<V> result;
  result.pre.input = through_cell * gates.cell * gates.input * (one - gates.input);
  // a closed gate first: a huge cell before it would overflow, and infinity times 0 is NaN
  result.pre.forget = through_cell * gates.forget * (one - gates.forget) * cell_before;
  result.pre.cell = through_cell * gates.input * (one - gates.cell * gates.cell);
  result.pre.output = hidden * tanh_cell * gates.output * (one - gates.output);
  result.cell_before = through_cell * gates.forget;
  result.hidden = gates.output * tanh_cell;
  return result;
}

FASTOPT_END_NAMESPACE
