#pragma once

#include "bindings/cross_entropy_tensors.h"

namespace fastopt {

void cross_entropy(const CrossEntropyRows& rows, int threads);

}  // namespace fastopt
