#include "host_sim/block.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <utility>

namespace fastopt::host_sim {
namespace {

// Far beyond what any wait takes while the other side still moves.
constexpr size_t kMaxIdleYields = 100000;

std::string hexadecimal(uint32_t mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

const char* barrier_name(Barrier kind) {
  switch (kind) {
    case Barrier::kPlain:
      return "__syncthreads";
    case Barrier::kOr:
      return "__syncthreads_or";
    case Barrier::kAnd:
      return "__syncthreads_and";
    case Barrier::kCount:
      return "__syncthreads_count";
  }
  return "";
}

}  // namespace

__thread WorkerState worker_state;

Block::Block(LaunchState& launch)
    : launch_(launch), dynamic_shared_(nullptr, free), static_shared_() {
  const dim3& shape = launch.shape.block;
  thread_count_ = static_cast<size_t>(shape.x) * shape.y * shape.z;
  threads_ = std::make_unique<Thread[]>(thread_count_);
  warps_.resize((thread_count_ + kWarpSize - 1) / kWarpSize);
  stacks_ = take_stacks(thread_count_);
  native_.attach_native_stack();
  static_shared_ = find_static_shared(launch.kernel.address);
  void* memory = nullptr;
  // The exact size, for AddressSanitizer.
  if (posix_memalign(&memory, 128, launch.shape.dynamic_shared) != 0) throw std::bad_alloc();
  dynamic_shared_.reset(static_cast<std::byte*>(memory));
  worker_state.block = this;
}

Block::~Block() {
  worker_state = {};
  give_back_stacks(stacks_);
}

void Block::poison_shared() {
  memset(dynamic_shared_.get(), 0xFF, launch_.shape.dynamic_shared);
  std::byte* const begin = static_shared_.address;
  std::byte* const end = begin + static_shared_.bytes;
  auto* const own = reinterpret_cast<std::byte*>(&worker_state);
  if (own >= begin && own < end) {
    memset(begin, 0xFF, own - begin);
    memset(own + sizeof worker_state, 0xFF, end - own - sizeof worker_state);
  } else if (begin != end) {
    memset(begin, 0xFF, end - begin);
  }
}

void Block::start(uint32_t block, BlockView& view) {
  const LaunchShape& shape = launch_.shape;
  block_ = block;
  view_ = &view;
  random_ = Random(Random(launch_.seed + block).next());
  warps_run_on_ = random_.one_in(2);
  current_warp_ = -1;
  live_ = thread_count_;
  ready_warps_ = 0;
  const dim3 at = launch_.coordinates(block);
  for (Warp& warp : warps_) warp = {};
  for (size_t i = 0; i < thread_count_; ++i) {
    Thread& thread = threads_[i];
    const auto index = static_cast<unsigned>(i);
    thread.builtins = {{index % shape.block.x, index / shape.block.x % shape.block.y,
                        index / shape.block.x / shape.block.y},
                       {at.x, at.y, at.z},
                       shape.block,
                       shape.grid};
    thread.warp = static_cast<int>(i / kWarpSize);
    thread.lane = static_cast<int>(i % kWarpSize);
    thread.last_atomic = nullptr;
    thread.copies.clear();
    thread.copy_group = 0;
    thread.fiber.prepare(stacks_[i], thread_main);
    warps_[thread.warp].live |= 1u << thread.lane;
    set_ready(thread.warp, 1u << thread.lane);
  }
  poison_shared();
}

Block::Pause Block::run() {
  if (live_ != 0 && at_grid_sync_ == live_) {
    at_grid_sync_ = 0;
    for (size_t warp = 0; warp < warps_.size(); ++warp) {
      set_ready(static_cast<int>(warp), warps_[warp].live);
    }
  }
  Fiber& first = next_fiber();
  if (&first != &native_) {
    Fiber::switch_to(native_, first);
    worker_state.thread = nullptr;
    if (!error_.empty()) throw Error(error_);
    if (switch_requested_) {
      switch_requested_ = false;
      return Pause::kYielded;
    }
  }
  if (live_ == 0) return Pause::kFinished;
  if (at_grid_sync_ == live_) return Pause::kAtGridSync;
  throw Error(describe_deadlock());
}

void Block::thread_main() {
  Fiber::arrived();
  Block& block = *worker_state.block;
  std::string thrown;
  try {
    const detail::Kernel& kernel = block.launch_.kernel;
    kernel.call(kernel.arguments);
  } catch (const std::exception& exception) {
    thrown = std::string("an exception leaves the kernel: ") + exception.what();
  } catch (...) {
    thrown = "an exception leaves the kernel";
  }
  if (!thrown.empty()) block.fail(*worker_state.thread, std::move(thrown));
  block.exit_thread(*worker_state.thread);
}

void Block::set_ready(int warp, uint32_t lanes) {
  warps_[warp].ready |= lanes;
  if (warps_[warp].ready != 0) ready_warps_ |= 1u << warp;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    thread_at(warp, __builtin_ctz(rest)).state = Thread::State::kReady;
  }
}

Thread* Block::pick() {
  if (ready_warps_ == 0) return nullptr;
  const bool stay = current_warp_ >= 0 && warps_[current_warp_].ready != 0 &&
                    (warps_run_on_ || !random_.one_in(4));
  if (!stay) current_warp_ = random_.bit_of(ready_warps_);
  Warp& warp = warps_[current_warp_];
  const int lane = random_.some_bit_of(warp.ready);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) ready_warps_ &= ~(1u << current_warp_);
  return &thread_at(current_warp_, lane);
}

// The scheduler's own where no thread can run.
Fiber& Block::next_fiber() {
  launch_.heartbeat.store(launch_.heartbeat.load(std::memory_order_relaxed) + 1,
                          std::memory_order_relaxed);
  Thread* next = switch_requested_ ? nullptr : pick();
  if (!next) return native_;
  worker_state.builtins = &next->builtins;
  worker_state.thread = next;
  return next->fiber;
}

void Block::switch_away(Thread& self) {
  Fiber& next = next_fiber();
  if (&next != &self.fiber) Fiber::switch_to(self.fiber, next);
}

void Block::exit_thread(Thread& self) {
  if (!self.copies.empty() && self.copies.back().group == self.copy_group) {
    fail(self, "ends with cp.async that was never committed: no wait has waited for it");
  }
  self.state = Thread::State::kExited;
  progress();
  --live_;
  Warp& warp = warps_[self.warp];
  warp.live &= ~(1u << self.lane);
  // Those who wait for this thread need not any more.
  for (uint32_t rest = warp.waiting; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if ((warp.waiting & 1u << lane) != 0) complete(self, thread_at(self.warp, lane));
  }
  if (at_barrier_ != 0 && at_barrier_ == live_) release_barrier();

  Fiber::leave_to(self.fiber, next_fiber());
}

// The stack of the thread is left as it is, so nothing on it may own memory.
void Block::fail(const Thread& thread, std::string text) {
  error_ = describe(thread) + ": " + text;
  std::string().swap(text);
  Fiber::leave_to(worker_state.thread->fiber, native_);
}

int Block::barrier(Thread& self, Barrier kind, bool predicate) {
  if (at_barrier_ == 0) {
    barrier_kind_ = kind;
    barrier_true_ = 0;
  } else if (barrier_kind_ != kind) {
    fail(self, std::string(barrier_name(kind)) + " while other threads wait at " +
                   barrier_name(barrier_kind_));
  }
  self.state = Thread::State::kAtBarrier;
  warps_[self.warp].at_barrier |= 1u << self.lane;
  barrier_true_ += predicate;
  if (++at_barrier_ == live_) release_barrier();
  switch_away(self);
  return barrier_result_;
}

void Block::release_barrier() {
  switch (barrier_kind_) {
    case Barrier::kPlain:
      break;
    case Barrier::kOr:
      barrier_result_ = barrier_true_ != 0;
      break;
    case Barrier::kAnd:
      barrier_result_ = barrier_true_ == static_cast<int>(at_barrier_);
      break;
    case Barrier::kCount:
      barrier_result_ = barrier_true_;
      break;
  }
  at_barrier_ = 0;
  for (size_t warp = 0; warp < warps_.size(); ++warp) {
    set_ready(static_cast<int>(warp), warps_[warp].at_barrier);
    warps_[warp].at_barrier = 0;
  }
  progress();
  if (launch_.several_resident && random_.one_in(8)) switch_requested_ = true;
}

void Block::warp_collective(Thread& self, const WarpOperation& operation, uint32_t mask,
                            void* lane) {
  const uint32_t own = 1u << self.lane;
  if ((mask & own) == 0) {
    fail(self, std::string(operation.name) + ": the calling lane is not in its own mask " +
                   hexadecimal(mask));
  }
  self.state = Thread::State::kAtWarpOperation;
  self.operation = &operation;
  self.mask = mask;
  self.operand = lane;
  warps_[self.warp].waiting |= own;
  complete(self, self);
  if (self.state == Thread::State::kAtWarpOperation) switch_away(self);
}

// Ends the operation of `waiting` if all its lanes are there. `self` runs on.
void Block::complete(Thread& self, const Thread& waiting) {
  Warp& warp = warps_[waiting.warp];
  const uint32_t members = waiting.mask & warp.live;
  if ((members & ~warp.waiting) != 0) return;

  void* operands[kWarpSize] = {};
  for (uint32_t rest = members; rest != 0; rest &= rest - 1) {
    const Thread& member = thread_at(waiting.warp, __builtin_ctz(rest));
    const bool same_operation = member.operation == waiting.operation ||
                                strcmp(member.operation->name, waiting.operation->name) == 0;
    if (!same_operation || member.mask != waiting.mask) {
      fail(waiting, std::string(waiting.operation->name) + " with mask " +
                        hexadecimal(waiting.mask) + " names lane " + std::to_string(member.lane) +
                        ", which is at " + member.operation->name + " with mask " +
                        hexadecimal(member.mask));
    }
    operands[member.lane] = member.operand;
  }
  waiting.operation->combine(operands, members);
  warp.waiting &= ~members;
  const uint32_t own = waiting.warp == self.warp ? 1u << self.lane : 0;
  set_ready(waiting.warp, members & ~own);
  if (self.state != Thread::State::kExited) self.state = Thread::State::kReady;
  progress();
}

void Block::grid_sync(Thread& self) {
  if (!launch_.shape.cooperative) fail(self, "grid_sync in a launch that is not cooperative");
  self.state = Thread::State::kAtGridSync;
  ++at_grid_sync_;
  progress();
  switch_away(self);
}

void Block::thread_fence(Thread& self) {
  if (launch_.memory.empty()) return;
  if (const auto race = launch_.memory.publish(*view_)) fail(self, launch_.describe(*race));
}

void Block::yield(Thread& self) {
  if (++launch_.idle_yields > kMaxIdleYields) {
    fail(self, launch_.shape.cooperative
                   ? "this thread waits for a value that never comes"
                   : "this thread waits for a value that never comes; only blocks of a cooperative "
                     "launch may wait for one another");
  }
  if (launch_.several_resident && (ready_warps_ == 0 || random_.one_in(4))) {
    switch_requested_ = true;
  }
  current_warp_ = -1;
  set_ready(self.warp, 1u << self.lane);
  switch_away(self);
}

void Block::begin_atomic(Thread& self, void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(self, "an atomic on an address that is not aligned");
  }
  if (launch_.memory.empty()) return;
  if (const auto race = launch_.memory.begin_atomic(*view_, address, bytes)) {
    fail(self, launch_.describe(*race));
  }
}

void Block::end_atomic(Thread& self, void* address, size_t bytes, bool changed) {
  if (!launch_.memory.empty()) {
    if (const auto race = launch_.memory.end_atomic(*view_, address, bytes, changed)) {
      fail(self, launch_.describe(*race));
    }
  }
  // Only one that repeats itself without effect can be a wait.
  if (changed || self.last_atomic != address) progress();
  self.last_atomic = address;
  if (random_.one_in(8)) yield(self);
}

bool Block::is_shared(const void* address, size_t bytes) const {
  const auto* first = static_cast<const std::byte*>(address);
  const auto within = [&](const std::byte* begin, size_t size) {
    return first >= begin && first + bytes <= begin + size;
  };
  return within(dynamic_shared_.get(), launch_.shape.dynamic_shared) ||
         within(static_shared_.address, static_shared_.bytes);
}

std::string Block::describe(const Thread& thread) const {
  const uint3& at = thread.builtins.thread_index;
  return std::string("kernel ") + launch_.kernel.name + ", block " +
         launch_.describe_block(block_) + ", thread " + coordinate_text(at);
}

// Names one thread of each kind of wait.
std::string Block::describe_deadlock() const {
  const Thread* barrier = nullptr;
  const Thread* warp_operation = nullptr;
  const Thread* grid_sync = nullptr;
  size_t at_warp_operations = 0;
  for (size_t i = 0; i < thread_count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state == Thread::State::kAtBarrier) barrier = &thread;
    if (thread.state == Thread::State::kAtGridSync) grid_sync = &thread;
    if (thread.state == Thread::State::kAtWarpOperation) {
      warp_operation = &thread;
      ++at_warp_operations;
    }
  }
  const Thread& named = warp_operation ? *warp_operation : *barrier;
  std::string text = describe(named) + ": deadlock:";
  const auto add = [&](size_t count, const std::string& where) {
    text += " " + std::to_string(count) + " thread(s) wait at " + where + ";";
  };
  if (barrier) add(at_barrier_, barrier_name(barrier_kind_));
  if (grid_sync) add(at_grid_sync_, "grid_sync");
  if (warp_operation) {
    const Warp& warp = warps_[warp_operation->warp];
    add(at_warp_operations, "warp operations, the one named here at " +
                                std::string(warp_operation->operation->name) + " with mask " +
                                hexadecimal(warp_operation->mask) + " for lanes " +
                                hexadecimal(warp_operation->mask & warp.live & ~warp.waiting));
  }
  text += " " + std::to_string(thread_count_ - live_) + " have exited";
  return text;
}

}  // namespace fastopt::host_sim
