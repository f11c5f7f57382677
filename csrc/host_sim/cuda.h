#pragma once

// Stands in for <cuda_runtime.h> in kernels that run in the simulator.

#include "host_sim/atomics.h"
#include "host_sim/device.h"
#include "host_sim/host_sim.h"
#include "host_sim/math_intrinsics.h"
#include "host_sim/vector_types.h"
#include "host_sim/warp_intrinsics.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
// Each block that is alive has an OS thread of its own, whose thread-local variables are filled
// with 0xFF when the block starts.
#define __shared__ static thread_local

#define threadIdx (::fastopt::host_sim::worker_state.builtins->thread_index)
#define blockIdx (::fastopt::host_sim::worker_state.builtins->block_index)
#define blockDim (::fastopt::host_sim::worker_state.builtins->block_dim)
#define gridDim (::fastopt::host_sim::worker_state.builtins->grid_dim)
constexpr int warpSize = fastopt::host_sim::kWarpSize;

inline void __syncthreads() { fastopt::host_sim::barrier(fastopt::host_sim::Barrier::kPlain, 0); }
inline int __syncthreads_or(int predicate) {
  return fastopt::host_sim::barrier(fastopt::host_sim::Barrier::kOr, predicate);
}
inline int __syncthreads_and(int predicate) {
  return fastopt::host_sim::barrier(fastopt::host_sim::Barrier::kAnd, predicate);
}
inline int __syncthreads_count(int predicate) {
  return fastopt::host_sim::barrier(fastopt::host_sim::Barrier::kCount, predicate);
}

inline void __threadfence_block() {}
inline void __threadfence() { fastopt::host_sim::thread_fence(); }
inline void __threadfence_system() { fastopt::host_sim::thread_fence(); }
inline void __nanosleep(unsigned) { fastopt::host_sim::yield(); }
[[noreturn]] inline void __trap() { fastopt::host_sim::fail("__trap"); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
