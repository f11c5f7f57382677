#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/update_rules.h"

namespace fastopt {

constexpr int kOperands = 2 + kMaxSlots;  // parameter, gradient, state slots
constexpr int kMaxDims = 64;              // torch's limit

// The unit in which work is shared out and converted. Fixed, so that an element meets the same
// instructions, and gets the same bits, whatever the number of threads. 512 elements in fp32, five
// operands: 10 KB of a 32 KB L1.
constexpr int64_t kTile = 512;

// A rule with the scalars of one step folded in, for one arithmetic type.
struct BoundRule {
  alignas(16) unsigned char functor[64];
  int rule;
  WeightDecay weight_decay;
  double decay;    // kL2: weight_decay; kDecoupled: 1 - lr * weight_decay
  bool maximize;   // the gradient's sign is turned
  double unscale;  // every gradient is multiplied by this first and, unless it is 1, written back
};

// The order in which the elements of tensors with unlike strides are visited: dimensions from the
// slowest to the fastest, as the parameter lies in memory, and each operand's strides in elements.
struct Walk {
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kOperands][kMaxDims];
};

// The update of one parameter.
struct StepTask {
  void* operands[kOperands];  // parameter, gradient, state slots; [numel] each
  const Walk* walk;           // nullptr: all operands are dense and lie in the same order
  int64_t numel;
  int64_t first_tile;  // tiles of the tasks before this one
  DType dtype;
  int bound_rule;
};

struct StepBatch {
  const StepTask* tasks;
  int64_t task_count;
  int64_t tile_count;
  const BoundRule* rules;
  int threads;
};

struct UpdateRuleInfo {
  const char* name;
  int slots;
  int hyperparameters;
};

// What one instruction set offers.
struct OptimizerKernels {
  const UpdateRuleInfo* rules;
  int rule_count;
  // Folds `hyperparameters` and the step number into bound.functor; bound.rule is set.
  void (*bind)(BoundRule& bound, DType dtype, const double* hyperparameters, double step);
  // Elementwise over all tasks in one parallel region. Tasks must not overlap in memory.
  void (*step)(const StepBatch& batch);
};

}  // namespace fastopt
