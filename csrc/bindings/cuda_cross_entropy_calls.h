#pragma once

#include <pybind11/pybind11.h>

namespace fastopt {

// cross_entropy and load_cross_entropy of the module.
void export_cuda_cross_entropy(pybind11::module_& module);

}  // namespace fastopt
