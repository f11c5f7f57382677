#pragma once

// Waiting for other blocks, and reading what they have written: inline PTX, each beside a plain
// twin.

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

// What another block may have written: past the L1 cache, and not before a barrier that stands
// before it.
__device__ __forceinline__ uint4 load_exchanged(const void* sixteen_bytes) {
#if defined(FASTOPT_HOST_SIM)
  return *static_cast<const uint4*>(sixteen_bytes);
#else
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(sixteen_bytes))
               : "memory");
  return value;
#endif
}
__device__ __forceinline__ float load_exchanged_float(const float* address) {
#if defined(FASTOPT_HOST_SIM)
  return *address;
#else
  float value;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];"
               : "=f"(value)
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
