#pragma once

#include "core/layerwise_rules.h"
#include "cpu/optimizer_step.h"

namespace fastopt {

// What one instruction set offers for rules whose step hangs on the whole parameter.
struct LayerwiseKernels {
  // Measures tasks of such rules in one parallel region, and folds what it finds into the rule of
  // each, which must be its own. Sums are those of tiles, in their order: they do not depend on the
  // number of threads. `squares` has room for batch.tile_count.
  void (*fold_squares)(const StepBatch& batch, BoundRule* rules, Squares* squares);
};

}  // namespace fastopt
