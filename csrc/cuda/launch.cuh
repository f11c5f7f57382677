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

#if defined(FASTOPT_HOST_SIM)

template <class... Params, class... Args>
void launch(const char* name, const Stream&, int64_t blocks, int threads, void (*kernel)(Params...),
            Args&&... args) {
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  host_sim::launch({grid, block}, name, kernel, std::forward<Args>(args)...);
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

template <class... Params, class... Args>
void launch(const char* name, const Stream& stream, int64_t blocks, int threads,
            void (*kernel)(Params...), Args&&... args) {
  const DeviceGuard guard(stream.device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name, stream.device);
}

// CUDA loads a kernel at its first launch, which must not happen inside a graph's capture.
template <class... Params>
void load_kernel(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "a kernel", -1);
}

#endif

}  // namespace fastopt::cuda
