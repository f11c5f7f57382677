#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/checked_tensor.h"
#include "core/cross_entropy.h"

namespace fastopt {

// Tensors and numbers of some rows of logits, as given; see core/cross_entropy.h.
struct CrossEntropyRows {
  pybind11::object logits, targets, class_weights, loss_scale, z_scale;
  int64_t ignore_index;
  double label_smoothing, softcap;
  pybind11::object losses, logsumexps;
};

// The class CrossEntropyRows of a module.
void export_cross_entropy_rows(pybind11::module_& module);

// Throws std::invalid_argument with the name of a tensor that does not fit.
CrossEntropyCall cross_entropy_call(const CrossEntropyRows& given, const Place& place);

// Throws std::invalid_argument for a target that is no class; reads them.
void check_targets(const CrossEntropyCall& call);

}  // namespace fastopt
