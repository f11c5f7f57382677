#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "cpu/tensor_walk.h"

namespace fastopt {

// A sum belongs to this many elements of one tensor, so that the norm has the same bits for any
// number of threads. The partial sums of 124M elements are 120 KB.
constexpr int64_t kNormTiles = 16;

// One gradient.
struct GradTask {
  void* data;        // [numel]
  const Walk* walk;  // nullptr: dense
  int64_t numel;
  int64_t first_chunk;  // chunks of kNormTiles tiles of the tasks before this one
  DType dtype;

  int64_t chunks() const { return (tiles_of(numel) + kNormTiles - 1) / kNormTiles; }
};

struct GradBatch {
  const GradTask* tasks;
  int64_t task_count;
  int64_t chunk_count;
  int threads;
};

// What one instruction set offers.
struct GradNormKernels {
  // (sum |g|^order)^(1/order) over all elements, computed in double precision; the largest and the
  // smallest magnitude for the orders inf and -inf, the number of tensors that are not zero for 0.
  // `partials` has room for chunk_count doubles.
  double (*norm)(const GradBatch& batch, double order, double* partials);
  // g <- g * scale, brought into [-clip_value, clip_value]. Tasks must not overlap in memory.
  void (*clip)(const GradBatch& batch, double scale, double clip_value);
};

}  // namespace fastopt
