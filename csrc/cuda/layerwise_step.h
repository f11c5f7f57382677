#pragma once

#include "core/layerwise_rules.h"
#include "cuda/optimizer_step.h"

namespace fastopt::cuda {

// The pass before the step of a rule that hangs on the whole parameter, after
// launch_advance_steps: measures each task that has a gradient and folds what it finds into its
// functor. `squares` has a place for each chunk of the table.
void launch_fold_squares(const TaskRange& range, const StepRule& rule, const DeviceTail& tail,
                         Squares* squares, const Stream& stream);

void load_layerwise_kernels(DType dtype);

}  // namespace fastopt::cuda
