// Out-of-bounds accesses for AddressSanitizer, which ends the program.

#include "harness.h"

namespace {

// The barrier puts the reads behind a switch of fibers.
__global__ void read_kernel(float* result, const float* values, int index) {
  __syncthreads();
  if (threadIdx.x == 33) *result = values[index];
}

__global__ void read_dynamic_kernel(float* result, int index) {
  float* values = sim::dynamic_shared<float>();
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 33) *result = values[index];
}

__global__ void read_static_kernel(float* result, int index) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 33) *result = values[index];
}

__global__ void read_local_kernel(float* result, int index) {
  float values[8];
  for (int i = 0; i < 8; ++i) values[i] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, i);
  if (threadIdx.x == 33) *result = values[index];
}

// Through the heap, so that the compiler does not know it.
int opaque(int value) {
  volatile int copy = value;
  return copy;
}

bool read_heap(int index) {
  std::vector<float> values(64, 1.0f);
  float result = 0.0f;
  sim::launch({dim3(1), dim3(64)}, "read_kernel", read_kernel, &result, values.data(),
              opaque(index));
  return result == 1.0f;
}

bool read_dynamic(int index) {
  float result = 0.0f;
  sim::launch({dim3(1), dim3(64), 64 * sizeof(float)}, "read_dynamic_kernel", read_dynamic_kernel,
              &result, opaque(index));
  return result == 1.0f;
}

bool read_static(int index) {
  float result = 0.0f;
  sim::launch({dim3(1), dim3(64)}, "read_static_kernel", read_static_kernel, &result,
              opaque(index));
  return result == 1.0f;
}

bool read_local(int index) {
  float result = 0.0f;
  sim::launch({dim3(1), dim3(64)}, "read_local_kernel", read_local_kernel, &result, opaque(index));
  return result == 1.0f;
}

}  // namespace

CASE(within_bounds) {
  return read_heap(63) && read_dynamic(63) && read_static(63) && read_local(7);
}
CASE(heap_out_of_bounds) { return read_heap(64); }
CASE(dynamic_shared_out_of_bounds) { return read_dynamic(64); }
CASE(static_shared_out_of_bounds) { return read_static(64); }
CASE(local_out_of_bounds) { return read_local(8); }
