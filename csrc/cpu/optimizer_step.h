#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/dtypes.h"
#include "core/state_codes.h"
#include "core/update_rules.h"
#include "cpu/tensor_walk.h"

namespace fastopt {

// A rule with the scalars of one step folded in, for one arithmetic type.
struct BoundRule {
  alignas(16) unsigned char functor[kFunctorBytes];
  int rule;
  WeightDecay weight_decay;
  double decay;   // kL2: weight_decay; kDecoupled: 1 - lr * weight_decay
  bool maximize;  // the gradient's sign is turned
};

// What surrounds the update of every parameter in one step.
struct Tail {
  double grad_scale = 1;  // gradients are multiplied by this first: unscaled and clipped by norm
  double clip_value = std::numeric_limits<double>::infinity();  // then brought into [-this, this]
  bool zero_grad = false;     // and are zeros when all is done; otherwise as the update saw them
  double average_weight = 0;  // average <- average + weight * (parameter - average), afterwards

  bool changes_gradients() const {
    return grad_scale != 1 || clip_value < std::numeric_limits<double>::infinity();
  }
};

// The update of one parameter.
struct StepTask {
  void* operands[kOperands];  // [numel] each; no gradient: only the average is updated
  const Walk* walk;           // nullptr: all operands are dense and lie in the same order
  int64_t numel;
  int64_t first_tile;  // tiles of the tasks before this one
  DType dtype;
  int bound_rule;
  const StateCoding* coding;  // nullptr: everything has the parameter's dtype
};

struct StepBatch {
  const StepTask* tasks;
  int64_t task_count;
  int64_t tile_count;
  const BoundRule* rules;
  Tail tail;
  int threads;
};

// What one instruction set offers.
struct OptimizerKernels {
  const UpdateRuleInfo* rules;
  int rule_count;
  // Folds `hyperparameters` and the progress into bound.functor; bound.rule is set.
  void (*bind)(BoundRule& bound, DType dtype, const double* hyperparameters,
               const Progress& progress);
  // Elementwise over all tasks in one parallel region. Tasks must not overlap in memory.
  void (*step)(const StepBatch& batch);
};

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

// The last task that starts at or before a tile.
inline const StepTask* task_at(const StepBatch& batch, int64_t tile) {
  const auto is_behind = [](int64_t t, const StepTask& task) { return t < task.first_tile; };
  return std::upper_bound(batch.tasks, batch.tasks + batch.task_count, tile, is_behind) - 1;
}

FASTOPT_END_NAMESPACE
