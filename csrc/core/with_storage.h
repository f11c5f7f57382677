#pragma once

#include "core/dtypes.h"

FASTOPT_BEGIN_NAMESPACE

// visit(a value of the storage type)
template <class Visitor>
auto with_storage(DType dtype, const Visitor& visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(double{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat16:
      return visit(Half{});
    case DType::kFloat32:
      break;
  }
  return visit(float{});
}

FASTOPT_END_NAMESPACE
