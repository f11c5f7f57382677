#pragma once

#include <stdexcept>
#include <string>

#include "bindings/torch_access.h"
#include "core/dtypes.h"

namespace fastopt {

// Where tensors have to lie, as DLPack numbers devices.
struct Place {
  int32_t device_type = torch_access::kDLCPU, device_index = 0;

  std::string name() const {
    return device_type == torch_access::kDLCPU ? "the CPU" : "card " + std::to_string(device_index);
  }
};

// A tensor whose memory kernels of a place may read. Throws std::invalid_argument with its name.
inline torch_access::Description described(pybind11::handle tensor, const char* name,
                                           const Place& place = {}) {
  torch_access::Description description;
  if (!torch_access::describe(tensor.ptr(), description) ||
      description.device_type != place.device_type ||
      description.device_index != place.device_index) {
    throw std::invalid_argument(std::string(name) + " must be a strided tensor on " + place.name());
  }
  return description;
}

// Sizes in words, as in [2, 3].
template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// The type of the arithmetic.
inline DType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace fastopt
