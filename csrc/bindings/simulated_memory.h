#pragma once

#include <algorithm>
#include <vector>

#include "bindings/layout.h"

#if defined(FASTOPT_HOST_SIM)
#include "host_sim/host_sim.h"
#endif

namespace fastopt {

// Memory that the simulator's blocks share as a card's do, for the time of a call.
class SimulatedMemory {
#if defined(FASTOPT_HOST_SIM)
 public:
  explicit SimulatedMemory(std::vector<Extent> extents) {
    sort_extents(extents);
    for (const Extent& extent : extents) {
      if (extent.begin == extent.end) continue;
      if (merged_.empty() || extent.begin > merged_.back().end) {
        merged_.push_back(extent);
      } else {
        merged_.back().end = std::max(merged_.back().end, extent.end);
      }
    }
    for (const Extent& extent : merged_) {
      host_sim::register_memory(reinterpret_cast<void*>(extent.begin), extent.end - extent.begin);
    }
  }
  ~SimulatedMemory() {
    for (const Extent& extent : merged_) {
      host_sim::unregister_memory(reinterpret_cast<void*>(extent.begin));
    }
  }
  SimulatedMemory(const SimulatedMemory&) = delete;
  SimulatedMemory& operator=(const SimulatedMemory&) = delete;

 private:
  std::vector<Extent> merged_;
#else
 public:
  explicit SimulatedMemory(const std::vector<Extent>&) {}
#endif
};

}  // namespace fastopt
