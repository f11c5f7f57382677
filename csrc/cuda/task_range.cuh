#pragma once

// What the kernels over lists of tensors share: finding a block's tensor, and gradients by value.

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/optimizer_step.h"

namespace fastopt::cuda {

template <int kCapacity>
struct GradAddresses {
  void* at[kCapacity];
};

// The block's share of its tensor.
struct Share {
  int task;
  int64_t start, end;  // elements
};

// The last task that starts at or before the block's chunk. Called by a whole block.
__device__ inline Share find_share(const DeviceTask* tasks, int begin, int end,
                                   int64_t first_chunk) {
  __shared__ int found;
  const int64_t chunk = first_chunk + blockIdx.x;
  if (threadIdx.x == 0) {
    int low = begin, high = end;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (tasks[middle].first_chunk <= chunk ? low : high) = middle;
    }
    found = low;
  }
  __syncthreads();
  const int task = found;
  const int64_t start = (chunk - tasks[task].first_chunk) * kChunk;
  const int64_t left = tasks[task].numel - start;
  return {task, start, start + (left < kChunk ? left : kChunk)};
}

__device__ inline double read(const Scalar& scalar) {
  if (!scalar.address) return scalar.value;
  return scalar.is_double ? *static_cast<const double*>(scalar.address)
                          : static_cast<double>(*static_cast<const float*>(scalar.address));
}

// Offset of an operand's element in memory.
__device__ inline int64_t offset_of(const Walk& walk, int operand, int64_t element) {
  int64_t offset = 0;
  for (int d = walk.dims - 1; d >= 0; --d) {
    offset += element % walk.sizes[d] * walk.strides[operand][d];
    element /= walk.sizes[d];
  }
  return offset;
}

// visit(GradAddresses) with the smaller of two argument lists that the gradients fit in.
template <class Visitor>
void with_grad_addresses(const TaskRange& range, const Visitor& visit) {
  const int count = range.end - range.begin;
  if (count <= kFewTensors) {
    GradAddresses<kFewTensors> few = {};
    std::copy(range.grads, range.grads + count, few.at);
    visit(few);
  } else {
    GradAddresses<kManyTensors> many = {};
    std::copy(range.grads, range.grads + count, many.at);
    visit(many);
  }
}

}  // namespace fastopt::cuda
