#include "host_sim/device.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "host_sim/block.h"

namespace fastopt::host_sim {
namespace {

Block& current_block() { return *worker_state.block; }
Thread& current_thread() { return *worker_state.thread; }

}  // namespace

void fail(std::string text) { current_block().fail(current_thread(), std::move(text)); }

int barrier(Barrier kind, int predicate) {
  return current_block().barrier(current_thread(), kind, predicate != 0);
}

void grid_sync() { current_block().grid_sync(current_thread()); }
void thread_fence() { current_block().thread_fence(current_thread()); }
void yield() { current_block().yield(current_thread()); }

void warp_collective(const WarpOperation& operation, uint32_t mask, void* lane) {
  current_block().warp_collective(current_thread(), operation, mask, lane);
}

int lane_index() { return current_thread().lane; }

void begin_atomic(void* address, size_t bytes) {
  current_block().begin_atomic(current_thread(), address, bytes);
}

void end_atomic(void* address, size_t bytes, bool changed) {
  current_block().end_atomic(current_thread(), address, bytes, changed);
}

void* dynamic_shared_memory() { return current_block().dynamic_shared(); }

bool is_shared(const void* address, size_t bytes) {
  return current_block().is_shared(address, bytes);
}

void copy_async(void* target, const void* source, int source_bytes) {
  const auto aligned = [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % kAsyncCopyBytes == 0;
  };
  if (!aligned(target) || !aligned(source)) fail("cp.async: an address is not aligned to 16");
  if (!is_shared(target, kAsyncCopyBytes)) fail("cp.async: the target is not in shared memory");
  if (source_bytes < 0 || source_bytes > kAsyncCopyBytes) {
    fail("cp.async: " + std::to_string(source_bytes) + " source bytes are not within 0 to 16");
  }
  Thread& thread = current_thread();
  AsyncCopy copy{static_cast<std::byte*>(target), {}, thread.copy_group};
  memcpy(copy.data.data(), source, static_cast<size_t>(source_bytes));
  memset(target, 0xFF, kAsyncCopyBytes);
  thread.copies.push_back(copy);
}

void commit_copies() { ++current_thread().copy_group; }

void wait_copies(int pending) {
  Thread& thread = current_thread();
  const auto first_kept =
      std::find_if(thread.copies.begin(), thread.copies.end(), [&](const AsyncCopy& copy) {
        return copy.group + static_cast<unsigned>(pending) >= thread.copy_group;
      });
  for (auto copy = thread.copies.begin(); copy != first_kept; ++copy) {
    memcpy(copy->target, copy->data.data(), kAsyncCopyBytes);
  }
  thread.copies.erase(thread.copies.begin(), first_kept);
}

}  // namespace fastopt::host_sim
