#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "host_sim/global_memory.h"
#include "host_sim/host_sim.h"

namespace fastopt::host_sim {

std::string coordinate_text(const dim3& at);

// What the blocks of one launch share. One of them runs at a time.
struct LaunchState {
  LaunchShape shape;
  detail::Kernel kernel;
  LaunchMemory memory;
  uint64_t seed = 0;
  bool several_resident = false;
  // Yields since a thread last did anything that another could be waiting for.
  size_t idle_yields = 0;
  // Counts switches, for the watchdog.
  std::atomic<uint64_t> heartbeat{0};

  dim3 coordinates(uint32_t block) const;
  std::string describe_block(uint32_t block) const;
  std::string describe(const Race& race) const;
};

}  // namespace fastopt::host_sim
