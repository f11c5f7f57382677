#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "host_sim/vector_types.h"

// What a running kernel asks of the simulator. The names of CUDA are put on top of this.
namespace fastopt::host_sim {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xFFFFFFFFu;

class Block;
struct Thread;

struct Builtins {
  uint3 thread_index;
  uint3 block_index;
  dim3 block_dim;
  dim3 grid_dim;
};

struct WorkerState {
  const Builtins* builtins;
  Block* block;
  Thread* thread;  // null while no kernel code runs
};

// The only thread-local variable of the simulator: every other one in a kernel's module is taken
// for static shared memory. `__thread`, because `extern thread_local` costs a call per access.
extern __thread WorkerState worker_state;

// Ends the launch with an Error that names the calling thread.
[[noreturn]] void fail(std::string text);

enum class Barrier { kPlain, kOr, kAnd, kCount };
int barrier(Barrier kind, int predicate);
void grid_sync();
void thread_fence();
// Lets other threads and blocks run.
void yield();

// Every lane of `mask` brings a pointer; the last one to arrive combines them for all.
struct WarpOperation {
  const char* name;
  void (*combine)(void* const* lanes, uint32_t members);  // lanes: [kWarpSize]
};
void warp_collective(const WarpOperation& operation, uint32_t mask, void* lane);
int lane_index();

// Brackets of an atomic operation, which itself acts on `address`.
void begin_atomic(void* address, size_t bytes);
void end_atomic(void* address, size_t bytes, bool changed);

void* dynamic_shared_memory();
// True for static and dynamic shared memory of the running block.
bool is_shared(const void* address, size_t bytes);

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_memory());
}

constexpr int kAsyncCopyBytes = 16;
// `target` holds 0xFF until the wait that completes the copy; bytes past `source_bytes` become 0.
void copy_async(void* target, const void* source, int source_bytes);
void commit_copies();
// Completes all groups but the `pending` youngest.
void wait_copies(int pending);

}  // namespace fastopt::host_sim
