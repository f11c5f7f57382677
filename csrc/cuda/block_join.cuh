#pragma once

#include "cuda/launch.cuh"

namespace fastopt::cuda {

// The join of all threads' values, in thread 0. Called by a whole block.
template <class Order>
__device__ double join_block(const Order& order, double value) {
  __shared__ double of_warps[32];
  for (int distance = 16; distance > 0; distance /= 2) {
    value = order.join(value, __shfl_down_sync(0xFFFFFFFFu, value, distance));
  }
  __syncthreads();  // of the call before
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int warp = 1; warp < warps; ++warp) value = order.join(value, of_warps[warp]);
  }
  return value;
}

}  // namespace fastopt::cuda
