#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fastopt {

// Tensors and numbers of an attention, as given; see cpu/attention.h.
struct AttentionTensors {
  pybind11::object query, key, value, bias, allowed, slopes, sinks;
  pybind11::object query_starts, key_starts, used_keys;
  double scale, softcap;
  int64_t left, right;
  bool bottom_right;
  double dropout;
  uint64_t seed;
};

// Throws what the calls below throw where the tensors do not fit each other.
void attention_check(const AttentionTensors& given);
void attention_forward(const AttentionTensors& given, pybind11::object output,
                       pybind11::object logsumexp, bool inference, int threads);
// `gradients` are those of query, key and value, of the bias or None, and of the sinks in each
// sequence, [batch, heads], or None.
void attention_backward(const AttentionTensors& given, pybind11::object output,
                        pybind11::object logsumexp, pybind11::object output_gradient,
                        const std::vector<pybind11::object>& gradients, int threads);
// The words that dropout compares, for one head; `words` is an int32 tensor [rows, keys].
void attention_random_words(uint64_t seed, int64_t head, pybind11::object words);

}  // namespace fastopt
