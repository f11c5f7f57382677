#include "bindings/cross_entropy_tensors.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/layout.h"
#include "bindings/torch_access.h"

namespace py = pybind11;

namespace fastopt {

using torch_access::Description;

void check_targets(const CrossEntropyCall& call) {
  for (int64_t row = 0; call.targets && row < call.rows; ++row) {
    const int64_t target = call.targets[row];
    if (target != call.ignore_index && (target < 0 || target >= call.classes)) {
      throw std::invalid_argument("targets must be classes, got " + std::to_string(target));
    }
  }
}

CrossEntropyCall cross_entropy_call(const CrossEntropyRows& given, const Place& place) {
  const Description logits = described(given.logits, "logits", place);
  const auto dtype = real_dtype_of(logits);
  if (!dtype || logits.dims != 2 || logits.sizes[1] == 0 ||
      !has_sizes(logits, Sizes{logits.sizes[0], logits.sizes[1]}, true) ||
      (logits.sizes[0] > 1 && logits.strides[0] < logits.sizes[1])) {
    throw std::invalid_argument("logits must be [rows, classes] with rows of their own");
  }
  CrossEntropyCall call{};
  call.dtype = *dtype;
  call.rows = logits.sizes[0];
  call.classes = logits.sizes[1];
  call.logits = logits.data;
  call.row_stride = logits.strides[0];
  call.ignore_index = given.ignore_index;
  call.label_smoothing = given.label_smoothing;
  call.softcap = given.softcap;
  const DType precise = compute_dtype(*dtype);
  const Sizes rows{call.rows}, classes{call.classes};
  const Description targets = described(given.targets, "targets", place);
  if (targets.dtype.code == torch_access::kDLInt) {
    if (targets.dtype.bits != 64 || !has_sizes(targets, rows)) {
      throw std::invalid_argument("targets must be contiguous int64 of shape " + shape_text(rows) +
                                  " or probabilities");
    }
    call.targets = static_cast<const int64_t*>(targets.data);
  } else {
    call.probabilities =
        present(given.targets, "targets", {call.rows, call.classes}, precise, place);
  }
  call.class_weights = address(given.class_weights, "class_weights", classes, precise, place);
  call.loss_scale = address(given.loss_scale, "loss_scale", rows, precise, place);
  call.z_scale = address(given.z_scale, "z_scale", rows, precise, place);
  call.losses = present(given.losses, "losses", rows, precise, place);
  call.logsumexps = present(given.logsumexps, "logsumexps", rows, precise, place);
  return call;
}

void export_cross_entropy_rows(py::module_& m) {
  py::class_<CrossEntropyRows>(m, "CrossEntropyRows", py::module_local())
      .def(py::init([](py::object logits, py::object targets, py::object class_weights,
                       py::object loss_scale, py::object z_scale, int64_t ignore_index,
                       double label_smoothing, double softcap, py::object losses,
                       py::object logsumexps) {
             return CrossEntropyRows{std::move(logits),        std::move(targets),
                                     std::move(class_weights), std::move(loss_scale),
                                     std::move(z_scale),       ignore_index,
                                     label_smoothing,          softcap,
                                     std::move(losses),        std::move(logsumexps)};
           }),
           py::arg("logits"), py::arg("targets"), py::arg("class_weights"), py::arg("loss_scale"),
           py::arg("z_scale"), py::arg("ignore_index"), py::arg("label_smoothing"),
           py::arg("softcap"), py::arg("losses"), py::arg("logsumexps"));
}

}  // namespace fastopt
