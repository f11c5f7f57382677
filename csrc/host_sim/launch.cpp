#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <numeric>
#include <thread>

#include "host_sim/block.h"
#include "host_sim/host_sim.h"

namespace fastopt::host_sim {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBlockZ = 64;
constexpr size_t kMaxGridYZ = 65535;
constexpr size_t kMaxDynamicShared = 227 << 10;  // sm_90; sm_80 has 163

std::atomic<uint64_t> current_seed{0};
std::atomic<int> max_resident_blocks{8};
std::atomic<double> time_limit_seconds{60};

void check(const LaunchShape& shape, const char* name) {
  const dim3& grid = shape.grid;
  const dim3& block = shape.block;
  const auto refuse = [&](const std::string& text) {
    throw Error(std::string("kernel ") + name + ": " + text);
  };
  if (size_t{grid.x} * grid.y * grid.z == 0) refuse("the grid is empty");
  if (size_t{block.x} * block.y * block.z == 0) refuse("the block is empty");
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > kMaxBlockZ ||
      threads > kMaxThreads) {
    refuse("a block of " + std::to_string(block.x) + " x " + std::to_string(block.y) + " x " +
           std::to_string(block.z) + " threads; at most 1024 fit, 64 of them in z");
  }
  if (grid.x > 0x7FFFFFFFu || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    refuse("the grid has too many blocks");
  }
  if (shape.dynamic_shared > kMaxDynamicShared) {
    refuse(std::to_string(shape.dynamic_shared) + " bytes of dynamic shared memory; at most " +
           std::to_string(kMaxDynamicShared) + " fit");
  }
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  const auto resident = static_cast<size_t>(max_resident_blocks.load());
  if (shape.cooperative && blocks > resident) {
    refuse("a cooperative grid of " + std::to_string(blocks) + " blocks, of which " +
           std::to_string(resident) + " fit on the device at once");
  }
}

// One launch. Every resident block has an OS thread of its own, and with it its own copy of the
// static shared variables, which are thread-local. The OS threads take turns.
class Grid {
 public:
  Grid(const LaunchShape& shape, const detail::Kernel& kernel)
      : blocks_(size_t{shape.grid.x} * shape.grid.y * shape.grid.z),
        order_(blocks_),
        views_(blocks_),
        workers_(shape.cooperative ? blocks_ : 1) {
    launch_.shape = shape;
    launch_.kernel = kernel;
    launch_.several_resident = workers_.size() > 1;
    uint64_t name_hash = 0;
    for (const char* c = kernel.name; *c != '\0'; ++c) {
      name_hash = Random(name_hash + static_cast<unsigned char>(*c)).next();
    }
    launch_.seed = Random(current_seed.load() ^ name_hash).next();
    random_ = Random(launch_.seed);
    std::iota(order_.begin(), order_.end(), 0u);
    for (size_t i = blocks_; i > 1; --i) {
      std::swap(order_[i - 1], order_[random_.below(static_cast<uint32_t>(i))]);
    }
    for (size_t i = 0; i < blocks_; ++i) views_[i].block = static_cast<uint32_t>(i);
  }

  void run() {
    for (size_t i = 0; i < workers_.size(); ++i) {
      workers_[i].thread = std::thread([this, i] { work(i); });
    }
    watch();
    for (Worker& worker : workers_) worker.thread.join();
    // The kernel's end makes all writes common.
    for (BlockView& view : views_) {
      if (launch_.memory.empty() || !error_.empty()) break;
      if (const auto race = launch_.memory.publish_pending(view)) {
        error_ = std::string("kernel ") + launch_.kernel.name + ": " + launch_.describe(*race);
      }
    }
    if (!error_.empty()) throw Error(error_);
  }

 private:
  enum class State { kRunnable, kAtGridSync, kFinished };
  struct Worker {
    std::thread thread;
    State state = State::kRunnable;
  };

  void work(size_t index) {
    try {
      Block block(launch_);
      if (!wait_for_turn(index)) return;
      if (workers_.size() > 1) {
        run_block(block, index, order_[index]);
      } else {
        for (uint32_t number : order_) run_block(block, index, number);
      }
      finish(index);
    } catch (const std::exception& exception) {
      stop(exception.what());
    }
  }

  void run_block(Block& block, size_t worker, uint32_t number) {
    BlockView& view = views_[number];
    block.start(number, view);
    for (;;) {
      launch_.memory.switch_in(view);
      const Block::Pause pause = block.run();
      if (pause == Block::Pause::kAtGridSync && !launch_.memory.empty()) {
        if (const auto race = launch_.memory.publish(view)) {
          throw Error(std::string("kernel ") + launch_.kernel.name + ": " +
                      launch_.describe(*race));
        }
      }
      launch_.memory.switch_out(view);
      if (pause == Block::Pause::kFinished) return;
      if (!pass_turn(worker, pause)) throw Error("");
    }
  }

  bool wait_for_turn(size_t worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return stopped_ || turn_ == worker; });
    return !stopped_;
  }

  bool pass_turn(size_t worker, Block::Pause pause) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (pause == Block::Pause::kAtGridSync) workers_[worker].state = State::kAtGridSync;
      choose_next();
    }
    return wait_for_turn(worker);
  }

  void finish(size_t worker) {
    std::lock_guard<std::mutex> lock(mutex_);
    workers_[worker].state = State::kFinished;
    ++finished_;
    choose_next();
  }

  // With the mutex held.
  void choose_next() {
    std::vector<size_t> runnable;
    for (int attempt = 0; attempt < 2 && runnable.empty(); ++attempt) {
      for (size_t i = 0; i < workers_.size(); ++i) {
        if (workers_[i].state == State::kRunnable) runnable.push_back(i);
      }
      if (!runnable.empty() || finished_ != 0) break;
      for (Worker& waiting : workers_) waiting.state = State::kRunnable;
      launch_.memory.order_all();
    }
    if (!runnable.empty()) {
      turn_ = runnable[random_.below(static_cast<uint32_t>(runnable.size()))];
    } else if (finished_ < workers_.size()) {
      record_error(std::string("kernel ") + launch_.kernel.name +
                   ": deadlock: " + std::to_string(workers_.size() - finished_) +
                   " block(s) wait at grid_sync, " + std::to_string(finished_) + " have ended");
    }
    changed_.notify_all();
  }

  void stop(const std::string& text) {
    std::lock_guard<std::mutex> lock(mutex_);
    record_error(text);
    changed_.notify_all();
  }

  // With the mutex held. The first error is the cause of the others.
  void record_error(const std::string& text) {
    if (error_.empty()) error_ = text;
    stopped_ = true;
  }

  static void interrupt(int) {
    if (!worker_state.thread) return;
    fail(
        "this thread does not come to a synchronisation, an atomic or its end; does it wait for a "
        "plain read to change?");
  }

  // Returns when all workers are done. A thread that never synchronises is stopped by a signal.
  void watch() {
    using Clock = std::chrono::steady_clock;
    const auto limit = std::chrono::duration<double>(time_limit_seconds.load());
    uint64_t seen = launch_.heartbeat.load();
    auto since = Clock::now();
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopped_ && finished_ < workers_.size()) {
      changed_.wait_for(lock, std::min(limit, std::chrono::duration<double>(1)));
      const uint64_t now_seen = launch_.heartbeat.load();
      if (now_seen != seen) {
        seen = now_seen;
        since = Clock::now();
      } else if (Clock::now() - since > limit) {
        // A real-time signal: neither Python nor libraries use them.
        struct sigaction action = {}, previous = {};
        action.sa_handler = interrupt;
        action.sa_flags = SA_NODEFER;  // the handler does not return
        sigaction(SIGRTMAX - 1, &action, &previous);
        pthread_kill(workers_[turn_].thread.native_handle(), SIGRTMAX - 1);
        changed_.wait_for(lock, std::chrono::seconds(1));
        sigaction(SIGRTMAX - 1, &previous, nullptr);
        since = Clock::now();
      }
    }
  }

  LaunchState launch_;
  size_t blocks_;
  std::vector<uint32_t> order_;
  std::vector<BlockView> views_;  // by block
  std::vector<Worker> workers_;
  Random random_;

  std::mutex mutex_;
  std::condition_variable changed_;
  size_t turn_ = 0;
  size_t finished_ = 0;
  bool stopped_ = false;
  std::string error_;
};

}  // namespace

void set_seed(uint64_t seed) { current_seed = seed; }

void set_max_resident_blocks(int blocks) {
  if (blocks < 1) throw Error("set_max_resident_blocks: at least one block is resident");
  max_resident_blocks = blocks;
}

int resident_blocks() { return max_resident_blocks; }

void set_time_limit(double seconds) { time_limit_seconds = seconds; }

void detail::run(const LaunchShape& shape, const Kernel& kernel) {
  check(shape, kernel.name);
  if (worker_state.thread) throw Error("a kernel cannot launch a kernel");
  Grid(shape, kernel).run();
}

}  // namespace fastopt::host_sim
