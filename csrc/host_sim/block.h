#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "host_sim/device.h"
#include "host_sim/fiber.h"
#include "host_sim/launch_state.h"
#include "host_sim/random.h"
#include "host_sim/static_shared.h"

namespace fastopt::host_sim {

struct AsyncCopy {
  std::byte* target;
  std::array<std::byte, kAsyncCopyBytes> data;
  unsigned group;
};

struct Thread {
  enum class State { kReady, kAtBarrier, kAtWarpOperation, kAtGridSync, kExited };

  Builtins builtins;
  Fiber fiber;
  State state;
  int warp, lane;
  const WarpOperation* operation;  // with `mask` and `operand`: valid at a warp operation
  uint32_t mask;
  void* operand;
  const void* last_atomic;
  std::vector<AsyncCopy> copies;
  unsigned copy_group;
};

struct Warp {
  uint32_t live, ready, waiting, at_barrier;  // lanes
};

// The threads of one block, on the OS thread that made this object. They run in `run`; all other
// functions but `start` are called by them.
class Block {
 public:
  enum class Pause { kFinished, kAtGridSync, kYielded };

  explicit Block(LaunchState& launch);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void start(uint32_t block, BlockView& view);
  // Throws Error. After kAtGridSync or kYielded it goes on where it stopped.
  Pause run();

  [[noreturn]] void fail(const Thread& thread, std::string text);
  int barrier(Thread& self, Barrier kind, bool predicate);
  void warp_collective(Thread& self, const WarpOperation& operation, uint32_t mask, void* lane);
  void grid_sync(Thread& self);
  void thread_fence(Thread& self);
  void yield(Thread& self);
  void begin_atomic(Thread& self, void* address, size_t bytes);
  void end_atomic(Thread& self, void* address, size_t bytes, bool changed);

  std::byte* dynamic_shared() { return dynamic_shared_.get(); }
  bool is_shared(const void* address, size_t bytes) const;

 private:
  static void thread_main();

  Thread& thread_at(int warp, int lane) { return threads_[warp * kWarpSize + lane]; }
  void poison_shared();
  void set_ready(int warp, uint32_t lanes);
  Thread* pick();
  Fiber& next_fiber();
  void switch_away(Thread& self);
  void release_barrier();
  void complete(Thread& self, const Thread& waiting);
  [[noreturn]] void exit_thread(Thread& self);
  void progress() { launch_.idle_yields = 0; }
  std::string describe(const Thread& thread) const;
  std::string describe_deadlock() const;

  LaunchState& launch_;
  Random random_;
  Fiber native_;
  std::vector<std::byte*> stacks_;
  std::unique_ptr<Thread[]> threads_;
  size_t thread_count_;
  std::vector<Warp> warps_;
  uint32_t ready_warps_ = 0;
  int current_warp_ = -1;
  bool warps_run_on_ = false;  // as long as they can; else they alternate

  size_t live_ = 0;
  size_t at_barrier_ = 0;
  size_t at_grid_sync_ = 0;
  Barrier barrier_kind_ = Barrier::kPlain;
  int barrier_true_ = 0;
  int barrier_result_ = 0;

  uint32_t block_ = 0;
  BlockView* view_ = nullptr;
  std::unique_ptr<std::byte, void (*)(void*)> dynamic_shared_;
  StaticShared static_shared_;
  bool switch_requested_ = false;
  std::string error_;
};

}  // namespace fastopt::host_sim
