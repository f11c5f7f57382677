#pragma once

// The one way to launch a kernel: explicit device and stream, and an error that names the kernel
// and the card. Nothing here allocates, frees or waits.

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/device.h"

#if defined(FASTOPT_HOST_SIM)
#include "host_sim/cuda.h"
#include "host_sim/host_sim.h"
#else
#include <cuda_runtime.h>
#endif

namespace fastopt::cuda {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;      // dynamic shared memory of a block
  bool cooperative = false;  // all blocks are resident together and may wait for each other
};

#if defined(FASTOPT_HOST_SIM)

template <class... Params, class... Args>
void launch(const char* name, const Stream&, const LaunchShape& shape, void (*kernel)(Params...),
            Args&&... args) {
  const dim3 grid(static_cast<unsigned>(shape.blocks)), block(static_cast<unsigned>(shape.threads));
  host_sim::launch({grid, block, static_cast<size_t>(shape.shared_bytes), shape.cooperative}, name,
                   kernel, std::forward<Args>(args)...);
}

template <class... Params>
int64_t resident_blocks(const Stream&, const LaunchShape&, void (*)(Params...)) {
  return host_sim::resident_blocks();
}

// Of the block that runs.
__device__ inline unsigned char* dynamic_shared() {
  return host_sim::dynamic_shared<unsigned char>();
}

template <class... Params>
void load_kernel(void (*)(Params...)) {}

#else

// What went wrong with a kernel on a card, or nothing.
void check(cudaError_t status, const char* what, int device);

// Makes a device the current one for a while.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", device);
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice", device);
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// What a block has without being asked for.
constexpr int kUsualSharedBytes = 48 << 10;

template <class... Params>
void allow_shared(const LaunchShape& shape, void (*kernel)(Params...), int device) {
  if (shape.shared_bytes <= kUsualSharedBytes) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes),
        "cudaFuncSetAttribute", device);
}

template <class... Params, class... Args>
void launch(const char* name, const Stream& stream, const LaunchShape& shape,
            void (*kernel)(Params...), Args&&... args) {
  if (shape.blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": too many blocks");
  const DeviceGuard guard(stream.device);
  allow_shared(shape, kernel, stream.device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = shape.cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name, stream.device);
}

// How many blocks of a shape the device holds at once; 0 where not even one fits.
template <class... Params>
int64_t resident_blocks(const Stream& stream, const LaunchShape& shape, void (*kernel)(Params...)) {
  const DeviceGuard guard(stream.device);
  int allowed = 0, multiprocessors = 0, per_multiprocessor = 0;
  check(cudaDeviceGetAttribute(&allowed, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device),
        "cudaDeviceGetAttribute", stream.device);
  if (shape.shared_bytes > allowed) return 0;
  allow_shared(shape, kernel, stream.device);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, stream.device),
        "cudaDeviceGetAttribute", stream.device);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, shape.threads,
                                                      static_cast<size_t>(shape.shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", stream.device);
  return static_cast<int64_t>(multiprocessors) * per_multiprocessor;
}

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// CUDA loads a kernel at its first launch, which must not happen inside a graph's capture.
template <class... Params>
void load_kernel(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "a kernel", -1);
}

#endif

}  // namespace fastopt::cuda
