#pragma once

#include "core/dtypes.h"

namespace fastopt::cuda {

// visit(a value of the storage type)
template <class Visitor>
void with_storage(DType dtype, const Visitor& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kFloat64:
      return visit(double{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat16:
      return visit(Half{});
  }
}

}  // namespace fastopt::cuda
