#pragma once

#include "cuda/launch.cuh"

namespace fastopt::cuda {

// A read behind which everything is seen that was written before the counter was raised.
__device__ __forceinline__ unsigned load_acquire(unsigned* address) {
#if defined(FASTOPT_HOST_SIM)
  return atomicAdd(address, 0u);  // the simulator orders blocks by atomics
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
#endif
}

// A barrier for some of the blocks of a cooperative launch, in two halves: a block may do other
// work between its arrival and the wait for the others. Both are called by a whole block.
class GridBarrier {
 public:
  // The counter is zero before the launch and nobody else's.
  __device__ GridBarrier(unsigned* counter, unsigned blocks) : counter_(counter), blocks_(blocks) {}

  // What the block has written so far is there for all blocks that wait from now on.
  __device__ void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter_, 1u);
    }
    awaited_ += blocks_;
  }

  // Returns when all blocks have arrived as often as this one.
  __device__ void wait() {
    if (threadIdx.x == 0) {
      // A difference: the counter may wrap around.
      while (static_cast<int>(load_acquire(counter_) - awaited_) < 0) __nanosleep(kPause);
    }
    __syncthreads();
  }

 private:
  static constexpr unsigned kPause = 20;  // ns, a tenth of what an access of the L2 cache takes

  unsigned* counter_;
  unsigned blocks_;
  unsigned awaited_ = 0;
};

}  // namespace fastopt::cuda
