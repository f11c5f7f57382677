#pragma once

#include <cstdint>

#include "core/update_rules.h"

namespace fastopt {

// The operands of one parameter's update, in the order in which tasks and walks list them.
constexpr int kParam = 0;
constexpr int kGrad = 1;
constexpr int kAverage = 2;
constexpr int kFirstSlot = 3;
constexpr int kOperands = kFirstSlot + kMaxSlots;

constexpr int kMaxDims = 64;  // torch's limit

// The order in which the elements of tensors with unlike strides are visited: dimensions from the
// slowest to the fastest, as the parameter lies in memory, and each operand's strides in elements.
struct Walk {
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kOperands][kMaxDims];
};

}  // namespace fastopt
