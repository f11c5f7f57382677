#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/layout.h"
#include "bindings/torch_access.h"
#include "core/dtypes.h"

namespace fastopt {

using Sizes = std::vector<int64_t>;

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

// True where the sizes are those given, the last dimension is dense and the others leave no gap but
// for the outermost one, where that may have any stride.
inline bool has_sizes(const torch_access::Description& given, const Sizes& sizes,
                      bool any_row_stride = false) {
  if (given.dims != static_cast<int>(sizes.size())) return false;
  int64_t expected_stride = 1;
  for (int i = given.dims - 1; i >= 0; --i) {
    const bool is_free = any_row_stride && i == 0;
    const bool dense = is_free || given.sizes[i] == 1 || given.strides[i] == expected_stride;
    if (given.sizes[i] != sizes[i] || !dense) return false;
    expected_stride *= sizes[i];
  }
  return true;
}

// A tensor's memory, after what would have the kernels leave it has been refused; nullptr for None.
inline void* address(pybind11::handle tensor, const char* name, const Sizes& sizes, DType dtype,
                     const Place& place = {}) {
  if (tensor.is_none()) return nullptr;
  const torch_access::Description given = described(tensor, name, place);
  if (real_dtype_of(given) == dtype && has_sizes(given, sizes)) return given.data;
  throw std::invalid_argument(std::string(name) + " must be contiguous, of shape " +
                              shape_text(sizes) + " and of the dtype that goes with the input's");
}

inline void* present(pybind11::handle tensor, const char* name, const Sizes& sizes, DType dtype,
                     const Place& place = {}) {
  if (tensor.is_none()) throw std::invalid_argument(std::string(name) + " must not be None");
  return address(tensor, name, sizes, dtype, place);
}

}  // namespace fastopt
