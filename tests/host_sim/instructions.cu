// Every instruction of tile_mma.cuh once, for nvcc.

#include "cuda/tile_mma.cuh"

using namespace fastopt;

__global__ void instructions_kernel(float* result, const float4* values) {
  __shared__ __align__(16) uint16_t tile[4][8][8];
  uint16_t* row = tile[threadIdx.x / 8][threadIdx.x % 8];
  copy_async_16(row, values + threadIdx.x);
  copy_async_commit();
  copy_async_16(row, values + threadIdx.x, 8);
  copy_async_commit();
  copy_async_wait<1>();
  copy_async_wait<0>();
  __syncwarp();

  uint32_t a[4], b[4];
  load_matrix_x4(a, row);
  load_matrix_x4_trans(b, row);
  const uint32_t b_half[2] = {b[0], b[1]};
  float accumulator[4] = {};
  mma_m16n8k16<BFloat16>(accumulator, a, b_half);
  mma_m16n8k16<Half>(accumulator, a, b_half);
  for (uint32_t& value : a) value = to_tf32(__uint_as_float(value));
  mma_m16n8k8(accumulator, a, b_half);
  for (int i = 0; i < 4; ++i) result[threadIdx.x * 4 + i] = accumulator[i];
}
