#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings/checked_tensor.h"
#include "core/attention_layer.h"

namespace fastopt {

// Tensors and numbers of an attention, as given; see core/attention_layer.h.
struct AttentionTensors {
  pybind11::object query, key, value, bias, allowed, slopes, sinks;
  pybind11::object query_starts, key_starts, used_keys;
  double scale, softcap;
  int64_t left, right;
  bool bottom_right;
  double dropout;
  uint64_t seed;
};

// The class AttentionTensors of a module.
void export_attention_tensors(pybind11::module_& module);

// All of these throw std::invalid_argument with the name of a tensor that does not fit.
void check_attention(const AttentionTensors& given, const Place& place);
AttentionForward forward_call(const AttentionTensors& given, const Place& place,
                              pybind11::handle output, pybind11::handle logsumexp);
// `gradients` are those of query, key and value, of the bias or None, and of the sinks in each
// sequence, [batch, heads], or None.
AttentionBackward backward_call(const AttentionTensors& given, const Place& place,
                                pybind11::handle output, pybind11::handle logsumexp,
                                pybind11::handle output_gradient,
                                const std::vector<pybind11::object>& gradients);

}  // namespace fastopt
