#include "cuda/device.h"
#include "cuda/launch.cuh"

namespace fastopt::cuda {

#if defined(FASTOPT_HOST_SIM)

std::string unavailable() { return ""; }
int toolkit_version() { return 0; }
int driver_version() { return 0; }

#else

void check(cudaError_t status, const char* what, int device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch error would be reported once more by whoever asks next
  std::string card = "no card";
  cudaDeviceProp properties;
  if (device >= 0 && cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    card = properties.name;
  }
  throw std::runtime_error(std::string(what) + " failed on " + card + ": " +
                           cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

std::string unavailable() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (status == cudaErrorInsufficientDriver && driver_version() == 0) return "no CUDA driver";
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count == 0 ? "no CUDA device" : "";
}

int toolkit_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) cudaGetLastError();
  return version;
}

#endif

}  // namespace fastopt::cuda
