#pragma once

#include <cstdint>

#include "core/counter.h"
#include "core/dtypes.h"
#include "core/operands.h"
#include "core/state_codes.h"
#include "core/update_rules.h"

namespace fastopt {

// What a block works on: so many elements of one tensor.
constexpr int64_t kChunk = 4096;

HOST_DEVICE constexpr int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// A number known on the host, or to be read on the device.
struct Scalar {
  double value = 0;
  const void* address = nullptr;  // of a float or a double
  bool is_double = false;
};

// In the place of a gradient's address: nothing is done for its task.
inline void* const kLeaveAlone = reinterpret_cast<void*>(1);
// A gradient without elements, whose step counts all the same.
inline void* const kNoElements = reinterpret_cast<void*>(16);

// One parameter, in a table in the device's memory. Triton's kernels know it by its words.
struct DeviceTask {
  void* operands[kOperands];  // but for the gradient: addresses that stay
  Counter step, product;      // on the device, or without data
  const Walk* walk;           // in the device's memory; nullptr: all dense and alike
  const StateCoding* coding;  // there too, but for the step; nullptr: nothing is coded
  int64_t numel;
  int64_t first_chunk;  // chunks of the tasks before this one
  bool grad_is_dense;   // whatever the walk says
};

// What surrounds the update of every parameter in one step.
struct DeviceTail {
  Scalar grad_scale;
  double clip_value;
  bool changes_gradients;
  bool zero_grad;
  bool moves_averages;
  double average_weight;
  const float* found_inf;  // nonzero: nothing is stepped or counted, gradients are zeroed all the
                           // same; nullptr: it is zero
};

// The rule of one group in one step.
struct StepRule {
  int rule;
  WeightDecay weight_decay;
  Scalar decay;
  bool maximize;
  Scalar hyperparameters[kMaxHyperparameters];
  Progress progress;        // as far as the host counts
  unsigned char* functors;  // on the device, [tasks, kFunctorBytes]: where the device counts, a
                            // hyperparameter is read there or the rule is layer-wise; otherwise
                            // nullptr
};

}  // namespace fastopt
