#pragma once

#include <pybind11/pybind11.h>

namespace fastopt {

// attention_forward, attention_backward and load_attention of the module.
void export_cuda_attention(pybind11::module_& module);

}  // namespace fastopt
