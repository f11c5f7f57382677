#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings/attention_tensors.h"

namespace fastopt {

// Throws what the calls below throw where the tensors do not fit each other.
void attention_check(const AttentionTensors& given);
void attention_forward(const AttentionTensors& given, pybind11::object output,
                       pybind11::object logsumexp, bool inference, int threads);
// `gradients` as in backward_call.
void attention_backward(const AttentionTensors& given, pybind11::object output,
                        pybind11::object logsumexp, pybind11::object output_gradient,
                        const std::vector<pybind11::object>& gradients, int threads);
// The words that dropout compares, for one head; `words` is an int32 tensor [rows, keys].
void random_words(uint64_t seed, int64_t head, int64_t first_row, pybind11::object words);

}  // namespace fastopt
