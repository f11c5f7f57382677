#pragma once

#include <cstdint>
#include <cstring>

#include "host_sim/device.h"

namespace fastopt::host_sim {

struct ShuffleLane {
  uint64_t bits;
  int source;
};
extern const WarpOperation kShuffle, kShuffleUp, kShuffleDown, kShuffleXor;

struct VoteLane {
  uint64_t value;  // a predicate for ballots; replaced by the result
};
extern const WarpOperation kSyncWarp, kBallot, kAny, kAll, kMatchAny;
extern const WarpOperation kReduceAdd, kReduceMax, kReduceMin, kReduceMaxSigned, kReduceMinSigned;
extern const WarpOperation kReduceAnd, kReduceOr, kReduceXor;

int segment_start(int width);  // of the calling lane; fails if width is not a power of two

inline uint64_t vote(const WarpOperation& operation, unsigned mask, uint64_t value) {
  VoteLane lane{value};
  warp_collective(operation, mask, &lane);
  return lane.value;
}

template <class T>
T shuffle(const WarpOperation& operation, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 32 or 64 bits");
  ShuffleLane lane{0, source};
  memcpy(&lane.bits, &value, sizeof value);
  warp_collective(operation, mask, &lane);
  memcpy(&value, &lane.bits, sizeof value);
  return value;
}

}  // namespace fastopt::host_sim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  using namespace fastopt::host_sim;
  return shuffle(kShuffle, mask, value, segment_start(width) + (source & (width - 1)));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace fastopt::host_sim;
  const int source = lane_index() - static_cast<int>(delta);
  return shuffle(kShuffleUp, mask, value, source < segment_start(width) ? lane_index() : source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace fastopt::host_sim;
  const int source = lane_index() + static_cast<int>(delta);
  const bool inside = source < segment_start(width) + width;
  return shuffle(kShuffleDown, mask, value, inside ? source : lane_index());
}

// A lane may read from an earlier segment, as PTX has it.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  using namespace fastopt::host_sim;
  const int source = lane_index() ^ lane_mask;
  const bool inside = source < segment_start(width) + width;
  return shuffle(kShuffleXor, mask, value, inside ? source : lane_index());
}

inline void __syncwarp(unsigned mask = fastopt::host_sim::kFullMask) {
  fastopt::host_sim::vote(fastopt::host_sim::kSyncWarp, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      fastopt::host_sim::vote(fastopt::host_sim::kBallot, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(fastopt::host_sim::vote(fastopt::host_sim::kAny, mask, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(fastopt::host_sim::vote(fastopt::host_sim::kAll, mask, predicate != 0));
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return static_cast<unsigned>(fastopt::host_sim::vote(fastopt::host_sim::kMatchAny, mask, bits));
}

// Nothing promises that lanes run together, so no more than this one is active.
inline unsigned __activemask() { return 1u << fastopt::host_sim::lane_index(); }

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(fastopt::host_sim::vote(fastopt::host_sim::kReduceAdd, mask, value));
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(fastopt::host_sim::vote(fastopt::host_sim::kReduceMax, mask, value));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(fastopt::host_sim::vote(fastopt::host_sim::kReduceMin, mask, value));
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return static_cast<int>(fastopt::host_sim::vote(fastopt::host_sim::kReduceMaxSigned, mask,
                                                  static_cast<uint64_t>(int64_t{value})));
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return static_cast<int>(fastopt::host_sim::vote(fastopt::host_sim::kReduceMinSigned, mask,
                                                  static_cast<uint64_t>(int64_t{value})));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(fastopt::host_sim::vote(fastopt::host_sim::kReduceAnd, mask, value));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(fastopt::host_sim::vote(fastopt::host_sim::kReduceOr, mask, value));
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(fastopt::host_sim::vote(fastopt::host_sim::kReduceXor, mask, value));
}
