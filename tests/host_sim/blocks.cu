// Threads of one block: barriers, warp operations, shared memory.

#include <chrono>
#include <thread>

#include "harness.h"

namespace {

__device__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
  return value;
}

template <bool kWithBarrier>
__global__ void __launch_bounds__(256) block_sum_kernel(float* sums, const float* values) {
  __shared__ float partial[8];
  const int thread = threadIdx.x;
  const float sum = warp_sum(values[blockIdx.x * blockDim.x + thread]);
  if (thread % warpSize == 0) partial[thread / warpSize] = sum;
  if (kWithBarrier) __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < 8; ++i) total += partial[i];
  __syncthreads();
  if (thread == 0) sums[blockIdx.x] = total;
}

template <bool kWithBarrier>
bool block_sums_are_right(int blocks) {
  std::vector<float> values(256 * blocks), sums(blocks, NAN);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 17);
  sim::launch({dim3(blocks), dim3(256)}, "block_sum_kernel", block_sum_kernel<kWithBarrier>,
              sums.data(), values.data());
  for (int block = 0; block < blocks; ++block) {
    float expected = 0.0f;
    for (int i = 0; i < 256; ++i) expected += values[block * 256 + i];
    if (sums[block] != expected) return false;
  }
  return true;
}

template <class Body>
__global__ void body_kernel(Body body) {
  body();
}

template <class Body>
void run(dim3 block, Body body, size_t dynamic_shared = 0) {
  sim::launch({dim3(1), block, dynamic_shared}, "body_kernel", body_kernel<Body>, body);
}

__global__ void poison_kernel(bool* clean) {
  __shared__ float fixed[40];
  float* sized = sim::dynamic_shared<float>();
  for (int i = 0; i < 40; ++i) {
    if (!std::isnan(fixed[i]) || !std::isnan(sized[i])) *clean = false;
  }
  __syncthreads();
  fixed[threadIdx.x] = sized[threadIdx.x] = 1.0f;
}

// Every lane of each mode and width against the definition in PTX.
__global__ void shuffle_kernel(int* wrong) {
  const int lane = threadIdx.x;
  for (int width = 1; width <= 32; width *= 2) {
    const int start = lane / width * width;
    const int end = start + width;
    for (int step = 0; step < 32; ++step) {
      const double from_index = __shfl_sync(0xFFFFFFFFu, lane * 1.5, step, width);
      const int up = __shfl_up_sync(0xFFFFFFFFu, lane, step, width);
      const long long down = __shfl_down_sync(0xFFFFFFFFu, lane * 10000000000LL, step, width);
      const float crossed = __shfl_xor_sync(0xFFFFFFFFu, lane * 0.5f, step, width);
      const int above = lane + step < end ? lane + step : lane;
      const int across = (lane ^ step) < end ? lane ^ step : lane;
      if (from_index != (start + step % width) * 1.5) atomicAdd(wrong, 1);
      if (up != (lane - step >= start ? lane - step : lane)) atomicAdd(wrong, 1);
      if (down != above * 10000000000LL) atomicAdd(wrong, 1);
      if (crossed != across * 0.5f) atomicAdd(wrong, 1);
    }
  }
}

__global__ void vote_kernel(int* wrong) {
  const int lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  const bool low = lane < 16;
  bool right = __ballot_sync(mask, lane % 2) == (low ? 0x0000AAAAu : 0xAAAA0000u);
  right &= __any_sync(mask, lane == 3) == low;
  right &= __all_sync(mask, lane != 3) == !low;
  right &= __reduce_add_sync(mask, lane - 20) == (low ? -200 : 56);
  right &= __reduce_min_sync(mask, lane - 20) == (low ? -20 : -4);
  right &= __reduce_max_sync(mask, static_cast<unsigned>(lane)) == (low ? 15u : 31u);
  right &= __match_any_sync(mask, lane / 4) == 0xFu << lane / 4 * 4;
  right &= __syncthreads_count(threadIdx.x < 5) == 5;
  right &= __syncthreads_or(threadIdx.x == 7) != 0;
  right &= __syncthreads_or(0) == 0;
  right &= __syncthreads_and(threadIdx.x != 7) == 0;
  right &= __syncthreads_and(1) != 0;
  if (!right) atomicAdd(wrong, 1);
}

__global__ void shapes_kernel(int* seen) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  atomicAdd(&seen[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}

}  // namespace

CASE(block_sum) { return block_sums_are_right<true>(3); }
CASE(block_sum_without_barrier) { return block_sums_are_right<false>(3); }

CASE(shared_memory_is_poisoned) {
  bool clean = true;
  sim::launch({dim3(3), dim3(32), 40 * sizeof(float)}, "poison_kernel", poison_kernel, &clean);
  return clean;
}

CASE(shuffles) {
  int wrong = 0;
  sim::launch({dim3(1), dim3(32)}, "shuffle_kernel", shuffle_kernel, &wrong);
  return wrong == 0;
}

CASE(votes) {
  int wrong = 0;
  sim::launch({dim3(1), dim3(64)}, "vote_kernel", vote_kernel, &wrong);
  return wrong == 0;
}

CASE(intrinsics) {
  int wrong = 0;
  run(dim3(1), [&wrong] {
    const auto check = [&wrong](bool right) { wrong += !right; };
    check(__float_as_uint(1.0f) == 0x3F800000u && __uint_as_float(0xC0000000u) == -2.0f);
    check(__longlong_as_double(__double_as_longlong(-3.5)) == -3.5);
    check(__float2int_rn(2.5f) == 2 && __float2int_rn(-3.5f) == -4 && __float2int_rz(-3.5f) == -3);
    check(__float2int_rd(-3.5f) == -4 && __float2int_ru(3.2f) == 4);
    check(__float2int_rn(NAN) == 0 && __float2int_rn(3e9f) == 2147483647);
    check(__float2uint_rn(-1.0f) == 0 && __float2uint_rz(5e9f) == 4294967295u);
    check(__popc(0xF0F0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(0x10) == 5);
    check(__brev(1u) == 0x80000000u && __umulhi(0x80000000u, 6u) == 3u && __mulhi(-1, 1) == -1);
    check(min(-1, 2) == -1 && max(3u, 2u) == 3u && max(-1, 2u) == 4294967295u);
    check(min(NAN, 2.0f) == 2.0f && max(int64_t{-5}, int64_t{-6}) == -5);
    check(rsqrtf(4.0f) == 0.5f && __fdividef(1.0f, 4.0f) == 0.25f && __saturatef(-2.0f) == 0.0f);
    check(__expf(0.0f) == 1.0f && exp2f(3.0f) == 8.0f && __log2f(8.0f) == 3.0f);
    const float4 vector = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
    check(vector.w == 4.0f && sizeof vector == 16 && alignof(uint2) == 8 && __ldg(&vector.y) == 2);
  });
  return wrong == 0;
}

CASE(shapes) {
  std::vector<int> seen(2 * 3 * 2 * 5 * 7 * 2, 0);
  sim::launch({dim3(2, 3, 2), dim3(5, 7, 2)}, "shapes_kernel", shapes_kernel, seen.data());
  for (int count : seen) {
    if (count != 1) return false;
  }
  return true;
}

CASE(missing_syncwarp) {
  float right = 0;
  run(dim3(32), [&right] {
    __shared__ float line[32];
    line[threadIdx.x] = 1.0f;
    right += line[threadIdx.x ^ 1];
  });
  return right == 32;
}

CASE(exited_threads_do_not_count) {
  int arrived = 0;
  run(dim3(96), [&arrived] {
    if (threadIdx.x % 3 == 0) return;
    __syncthreads();
    atomicAdd(&arrived, 1);
    __syncwarp();
  });
  return arrived == 64;
}

CASE(divergent_shuffle) {
  run(dim3(32), [] {
    if (threadIdx.x < 16) {
      __shfl_sync(0xFFFFFFFFu, 1, 0);
    } else {
      __ballot_sync(0xFFFFFFFFu, 1);
    }
  });
  return true;
}

CASE(shuffle_without_the_others) {
  run(dim3(32), [] {
    if (threadIdx.x < 16) __shfl_xor_sync(0xFFFFFFFFu, 1, 16);
  });
  return true;
}

CASE(shuffle_of_a_partial_warp) {
  run(dim3(48), [] { __shfl_down_sync(0xFFFFFFFFu, 1, 16); });
  return true;
}

CASE(other_masks) {
  run(dim3(32), [] { __syncwarp(threadIdx.x < 16 ? 0xFFFFFFFFu : 0xFFFFFFFEu | 1u << 31); });
  return true;
}

CASE(not_in_its_own_mask) {
  run(dim3(32), [] { __syncwarp(0xFFFFu); });
  return true;
}

CASE(barrier_against_warp_operation) {
  run(dim3(64), [] {
    if (threadIdx.x == 5) {
      __syncthreads();
    } else {
      __syncwarp();
      __syncthreads();
    }
  });
  return true;
}

CASE(different_barriers) {
  run(dim3(64), [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads_or(1);
    }
  });
  return true;
}

CASE(waits_for_a_value) {
  int flag = 0;
  run(dim3(64), [&flag] {
    while (atomicAdd(&flag, 0) == 0) __nanosleep(100);
  });
  return true;
}

CASE(waits_within_the_block) {
  int flag = 0;
  run(dim3(64), [&flag] {
    if (threadIdx.x == 40) atomicExch(&flag, 1);
    while (atomicAdd(&flag, 0) == 0) {
    }
  });
  return true;
}

CASE(spins_on_a_plain_read) {
  volatile int flag = 0;
  volatile int* const address = &flag;
  sim::set_time_limit(0.2);
  run(dim3(2), [address] {
    while (*address == 0) {
    }
  });
  return true;
}

CASE(trap) {
  run(dim3(2), [] {
    if (threadIdx.x == 1) __trap();
  });
  return true;
}

CASE(exception) {
  run(dim3(2), [] { throw std::runtime_error("of the kernel"); });
  return true;
}

CASE(large_block) {
  run(dim3(33, 32), [] {});
  return true;
}

CASE(empty_block) {
  run(dim3(0), [] {});
  return true;
}

CASE(empty_grid) {
  sim::launch({dim3(0), dim3(256)}, "shapes_kernel", shapes_kernel, nullptr);
  return true;
}

CASE(much_shared_memory) {
  run(dim3(32), [] {}, (227 << 10) + 1);
  return true;
}

CASE(works_after_an_error) {
  for (int i = 0; i < 3; ++i) {
    try {
      shuffle_without_the_others();
      return false;
    } catch (const sim::Error&) {
    }
  }
  return block_sums_are_right<true>(2);
}

CASE(four_host_threads) {
  bool right[4] = {};
  std::vector<std::thread> threads;
  for (bool& mine : right) {
    threads.emplace_back([&mine] {
      mine = true;
      for (int i = 0; i < 20; ++i) mine &= block_sums_are_right<true>(2);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return right[0] && right[1] && right[2] && right[3];
}

// The best of several, as other work may be running. 1 ms is ten times what it should take.
CASE(speed) {
  std::vector<float> values(256 * 100, 1.0f), sums(100);
  double best = 1.0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    sim::launch({dim3(100), dim3(256)}, "block_sum_kernel", block_sum_kernel<true>, sums.data(),
                values.data());
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count() / 100);
  }
  fprintf(stderr, "%.1f us per block\n", best * 1e6);
  return best < 1e-3;
}
