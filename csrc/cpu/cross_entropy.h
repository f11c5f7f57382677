#pragma once

#include "core/cross_entropy.h"

namespace fastopt {

// What one instruction set offers.
struct CrossEntropyKernels {
  void (*rows)(const CrossEntropyCall& call, int threads);
};

}  // namespace fastopt
