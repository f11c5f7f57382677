// Blocks of one grid: what they see of one another's writes.

#include "harness.h"

namespace {

template <class Body>
__global__ void body_kernel(Body body) {
  body();
}

template <class Body>
void run(dim3 grid, dim3 block, Body body, bool cooperative = false) {
  sim::launch({grid, block, 0, cooperative}, "body_kernel", body_kernel<Body>, body);
}

// Block 0 hands a value to block 1 behind a flag.
template <bool kWithFence>
bool hands_over() {
  alignas(64) static int memory[3];
  memory[0] = memory[1] = memory[2] = 0;
  Registered registered(memory, sizeof memory);
  int* data = &memory[0];
  int* flag = &memory[1];
  int* result = &memory[2];
  run(
      dim3(2), dim3(32),
      [=] {
        if (threadIdx.x != 0) return;
        if (blockIdx.x == 0) {
          *data = 42;
          if (kWithFence) __threadfence();
          atomicExch(flag, 1);
        } else {
          while (atomicAdd(flag, 0) == 0) {
          }
          *result = *data;
        }
      },
      true);
  return *result == 42;
}

// The last block to finish adds what the others have written.
template <bool kWithFence>
bool last_block_sums() {
  constexpr int kBlocks = 20;
  struct Memory {
    float partial[kBlocks];
    unsigned done;
    float total;
  };
  static Memory memory;
  memory = {};
  Registered registered(&memory, sizeof memory);
  run(dim3(kBlocks), dim3(64), [] {
    __shared__ bool last;
    if (threadIdx.x == 0) {
      memory.partial[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
      if (kWithFence) __threadfence();
      last = atomicAdd(&memory.done, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x != 0) return;
    float total = 0.0f;
    for (float value : memory.partial) total += value;
    memory.total = total;
    memory.done = 0;
  });
  return memory.total == kBlocks * (kBlocks + 1) / 2 && memory.done == 0;
}

template <class T>
bool atomics_sum() {
  static T memory[2];
  memory[0] = memory[1] = 0;
  Registered registered(&memory[0], sizeof(T));
  run(dim3(6), dim3(100), [] {
    atomicAdd(&memory[0], static_cast<T>(threadIdx.x));
    atomicAdd(&memory[1], static_cast<T>(2));
  });
  return memory[0] == static_cast<T>(6 * 4950) && memory[1] == static_cast<T>(1200);
}

template <bool kWithSync>
bool exchanges_over_the_grid() {
  constexpr int kBlocks = 6;
  static int memory[2][kBlocks];
  memset(memory, 0, sizeof memory);
  Registered registered(memory, sizeof memory);
  run(
      dim3(kBlocks), dim3(64),
      [] {
        const int block = blockIdx.x;
        for (int round = 0; round < 4; ++round) {
          if (threadIdx.x == 0) {
            memory[(round + 1) % 2][block] = memory[round % 2][(block + 1) % kBlocks] + block;
          }
          if (kWithSync) sim::grid_sync();
        }
      },
      true);
  int expected[2][kBlocks] = {};
  for (int round = 0; round < 4; ++round) {
    for (int block = 0; block < kBlocks; ++block) {
      expected[(round + 1) % 2][block] = expected[round % 2][(block + 1) % kBlocks] + block;
    }
  }
  return memcmp(memory, expected, sizeof memory) == 0;
}

}  // namespace

CASE(flag_with_fence) { return hands_over<true>(); }
CASE(flag_without_fence) { return hands_over<false>(); }
CASE(last_block_with_fence) { return last_block_sums<true>(); }
CASE(last_block_without_fence) { return last_block_sums<false>(); }

CASE(sums_of_atomics) {
  return atomics_sum<int>() && atomics_sum<unsigned>() && atomics_sum<unsigned long long>() &&
         atomics_sum<float>() && atomics_sum<double>();
}

CASE(other_atomics) {
  static int memory[6];
  memset(memory, 0, sizeof memory);
  memory[1] = 1000;
  memory[2] = -1;
  Registered registered(memory, sizeof memory);
  run(dim3(5), dim3(64), [] {
    const int number = blockIdx.x * blockDim.x + threadIdx.x;
    atomicMax(&memory[0], number);
    atomicMin(&memory[1], number);
    atomicAnd(&memory[2], ~(1 << number % 8));
    atomicOr(&memory[3], 1 << number % 8);
    if (atomicCAS(&memory[4], 0, number + 1) == 0) atomicAdd(&memory[5], 1);
  });
  return memory[0] == 319 && memory[1] == 0 && memory[2] == ~0xFF && memory[3] == 0xFF &&
         memory[4] != 0 && memory[5] == 1;
}

CASE(race) {
  static int value;
  Registered registered(&value, sizeof value);
  value = 0;
  run(dim3(3), dim3(1), [] { value = blockIdx.x + 1; });
  return true;
}

CASE(race_with_an_atomic) {
  static int value;
  Registered registered(&value, sizeof value);
  value = 7;
  run(dim3(3), dim3(1), [] {
    if (blockIdx.x == 0) value = 0;
    atomicAdd(&value, 1);
  });
  return true;
}

CASE(same_value_is_no_race) {
  static int value;
  Registered registered(&value, sizeof value);
  value = 0;
  run(dim3(3), dim3(1), [] { value = 5; });
  return value == 5;
}

CASE(own_elements_are_no_race) {
  std::vector<unsigned char> bytes(10007, 0);
  Registered registered(bytes.data(), bytes.size());
  run(dim3(40), dim3(256), [&bytes] {
    const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i < bytes.size()) bytes[i] = static_cast<unsigned char>(i % 251 + 1);
  });
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] != i % 251 + 1) return false;
  }
  return true;
}

CASE(lock) {
  static int memory[2];
  memory[0] = memory[1] = 0;
  Registered registered(memory, sizeof memory);
  run(
      dim3(4), dim3(1),
      [] {
        for (int i = 0; i < 5; ++i) {
          while (atomicCAS(&memory[0], 0, 1) != 0) {
          }
          memory[1] += 1;
          __threadfence();
          atomicExch(&memory[0], 0);
        }
      },
      true);
  return memory[1] == 20;
}

CASE(grid_sync) { return exchanges_over_the_grid<true>(); }
CASE(grid_without_sync) { return exchanges_over_the_grid<false>(); }

CASE(grid_sync_not_cooperative) {
  run(dim3(2), dim3(32), [] { sim::grid_sync(); });
  return true;
}

CASE(grid_sync_that_a_block_misses) {
  run(
      dim3(3), dim3(32),
      [] {
        if (blockIdx.x != 1) sim::grid_sync();
      },
      true);
  return true;
}

CASE(grid_sync_that_a_thread_misses) {
  run(
      dim3(3), dim3(32),
      [] {
        if (threadIdx.x != 1) {
          sim::grid_sync();
        } else {
          __syncthreads();
        }
      },
      true);
  return true;
}

CASE(many_cooperative_blocks) {
  run(dim3(9), dim3(32), [] { sim::grid_sync(); }, true);
  return true;
}

CASE(more_resident_blocks) {
  sim::set_max_resident_blocks(12);
  int arrived = 0;
  run(
      dim3(12), dim3(32),
      [&arrived] {
        atomicAdd(&arrived, 1);
        sim::grid_sync();
      },
      true);
  return arrived == 12 * 32;
}

CASE(waits_for_a_block_that_is_not_resident) {
  static int flag;
  flag = 0;
  run(dim3(2), dim3(1), [] {
    atomicAdd(&flag, 1);
    while (atomicAdd(&flag, 0) != 2) {
    }
  });
  return true;
}

CASE(shared_memory_of_blocks_stays_apart) {
  int wrong = 0;
  sim::LaunchShape shape{dim3(6), dim3(64), 64 * sizeof(int), true};
  const auto body = [&wrong] {
    __shared__ int fixed[64];
    int* sized = sim::dynamic_shared<int>();
    const int mine = blockIdx.x * 64 + threadIdx.x;
    fixed[threadIdx.x] = mine;
    sized[threadIdx.x] = -mine;
    for (int round = 0; round < 3; ++round) {
      sim::grid_sync();
      const int other = (threadIdx.x + round + 1) % 64;
      if (fixed[other] != static_cast<int>(blockIdx.x) * 64 + other) atomicAdd(&wrong, 1);
      if (sized[other] != -static_cast<int>(blockIdx.x) * 64 - other) atomicAdd(&wrong, 1);
    }
  };
  sim::launch(shape, "body_kernel", body_kernel<decltype(body)>, body);
  return wrong == 0;
}

CASE(overlapping_registration) {
  static int memory[4];
  Registered first(&memory[0], 8);
  Registered second(&memory[1], 8);
  return true;
}
