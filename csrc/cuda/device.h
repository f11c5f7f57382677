#pragma once

#include <string>

namespace fastopt::cuda {

struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

// "" where there is a usable card, otherwise the reason in words. Never throws.
std::string unavailable();

// The CUDA that the kernels were compiled with and the newest one that the driver serves: 13000 is
// 13.0. Zero where there is none.
int toolkit_version();
int driver_version();

}  // namespace fastopt::cuda
