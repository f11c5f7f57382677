#include "bindings/attention_calls.h"

#include <stdexcept>

#include "bindings/torch_access.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastopt {

using torch_access::Description;

void attention_check(const AttentionTensors& given) { check_attention(given, Place{}); }

void attention_forward(const AttentionTensors& given, py::object output, py::object logsumexp,
                       bool inference, int threads) {
  AttentionForward call = forward_call(given, Place{}, output, logsumexp);
  call.inference = inference;
  call.layer.threads = threads;
  py::gil_scoped_release released;
  chosen_instruction_set().attention->forward(call);
}

void attention_backward(const AttentionTensors& given, py::object output, py::object logsumexp,
                        py::object output_gradient, const std::vector<py::object>& gradients,
                        int threads) {
  AttentionBackward call =
      backward_call(given, Place{}, output, logsumexp, output_gradient, gradients);
  call.layer.threads = threads;
  py::gil_scoped_release released;
  chosen_instruction_set().attention->backward(call);
}

void random_words(uint64_t seed, int64_t head, int64_t first_row, py::object words) {
  const Description given = described(words, "words");
  if (given.dims != 2 || given.dtype.bits != 32 || given.sizes[1] % 64 != 0 ||
      given.strides[1] != 1 || given.strides[0] != given.sizes[1]) {
    throw std::invalid_argument("words must be contiguous int32 [rows, a multiple of 64]");
  }
  chosen_instruction_set().attention->random_words(
      seed, head, first_row, given.sizes[0], given.sizes[1], static_cast<uint32_t*>(given.data));
}

}  // namespace fastopt
