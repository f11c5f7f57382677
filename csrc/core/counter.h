#pragma once

#include "core/dtypes.h"

namespace fastopt {

// A number that torch keeps in a tensor of its own beside the state of a parameter.
struct Counter {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

template <class Storage>
HOST_DEVICE double advance_as(void* data, double factor, double summand) {
  using T = ComputeType<Storage>;
  auto* const number = static_cast<Storage*>(data);
  store(number, load(number) * static_cast<T>(factor) + static_cast<T>(summand));
  return load(number);
}

// counter <- counter * factor + summand, rounded to its dtype; the new value.
HOST_DEVICE double advance(const Counter& counter, double factor, double summand) {
  switch (counter.dtype) {
    case DType::kFloat64:
      return advance_as<double>(counter.data, factor, summand);
    case DType::kBFloat16:
      return advance_as<BFloat16>(counter.data, factor, summand);
    case DType::kFloat16:
      return advance_as<Half>(counter.data, factor, summand);
    case DType::kFloat32:
      break;
  }
  return advance_as<float>(counter.data, factor, summand);
}

// The number that a counter is at.
HOST_DEVICE double current(const Counter& counter) {
  switch (counter.dtype) {
    case DType::kFloat64:
      return load(static_cast<const double*>(counter.data));
    case DType::kBFloat16:
      return load(static_cast<const BFloat16*>(counter.data));
    case DType::kFloat16:
      return load(static_cast<const Half*>(counter.data));
    case DType::kFloat32:
      break;
  }
  return load(static_cast<const float*>(counter.data));
}

FASTOPT_END_NAMESPACE
