#include "host_sim/warp_intrinsics.h"

#include <algorithm>

namespace fastopt::host_sim {
namespace {

template <class Visit>
void for_each_lane(uint32_t members, Visit visit) {
  for (uint32_t rest = members; rest != 0; rest &= rest - 1) visit(__builtin_ctz(rest));
}

VoteLane& vote_lane(void* const* lanes, int lane) { return *static_cast<VoteLane*>(lanes[lane]); }

void shuffle_lanes(void* const* lanes, uint32_t members) {
  uint64_t bits[kWarpSize] = {};
  for_each_lane(members,
                [&](int lane) { bits[lane] = static_cast<const ShuffleLane*>(lanes[lane])->bits; });
  for_each_lane(members, [&](int lane) {
    ShuffleLane& own = *static_cast<ShuffleLane*>(lanes[lane]);
    if (own.source < 0 || own.source >= kWarpSize || (members >> own.source & 1u) == 0) {
      fail("a shuffle in which lane " + std::to_string(lane) + " reads lane " +
           std::to_string(own.source) + ", which does not take part");
    }
    own.bits = bits[own.source];
  });
}

template <class Combine>
void reduce(void* const* lanes, uint32_t members, Combine combine) {
  uint64_t result = vote_lane(lanes, __builtin_ctz(members)).value;
  for_each_lane(members & (members - 1),
                [&](int lane) { result = combine(result, vote_lane(lanes, lane).value); });
  for_each_lane(members, [&](int lane) { vote_lane(lanes, lane).value = result; });
}

void do_nothing(void* const*, uint32_t) {}

void ballot(void* const* lanes, uint32_t members) {
  uint64_t result = 0;
  for_each_lane(members, [&](int lane) { result |= vote_lane(lanes, lane).value << lane; });
  for_each_lane(members, [&](int lane) { vote_lane(lanes, lane).value = result; });
}

void match_any(void* const* lanes, uint32_t members) {
  uint64_t result[kWarpSize] = {};
  for_each_lane(members, [&](int lane) {
    for_each_lane(members, [&](int other) {
      const bool equal = vote_lane(lanes, lane).value == vote_lane(lanes, other).value;
      result[lane] |= uint64_t{equal} << other;
    });
  });
  for_each_lane(members, [&](int lane) { vote_lane(lanes, lane).value = result[lane]; });
}

void reduce_and(void* const* lanes, uint32_t members) {
  reduce(lanes, members, [](uint64_t a, uint64_t b) { return a & b; });
}
void reduce_or(void* const* lanes, uint32_t members) {
  reduce(lanes, members, [](uint64_t a, uint64_t b) { return a | b; });
}
void reduce_xor(void* const* lanes, uint32_t members) {
  reduce(lanes, members, [](uint64_t a, uint64_t b) { return a ^ b; });
}
void reduce_add(void* const* lanes, uint32_t members) {
  reduce(lanes, members, [](uint64_t a, uint64_t b) { return a + b; });
}
void reduce_max(void* const* lanes, uint32_t members) {
  reduce(lanes, members, [](uint64_t a, uint64_t b) { return std::max(a, b); });
}
void reduce_min(void* const* lanes, uint32_t members) {
  reduce(lanes, members, [](uint64_t a, uint64_t b) { return std::min(a, b); });
}
void reduce_max_signed(void* const* lanes, uint32_t members) {
  reduce(lanes, members, [](uint64_t a, uint64_t b) {
    return static_cast<uint64_t>(std::max(static_cast<int64_t>(a), static_cast<int64_t>(b)));
  });
}
void reduce_min_signed(void* const* lanes, uint32_t members) {
  reduce(lanes, members, [](uint64_t a, uint64_t b) {
    return static_cast<uint64_t>(std::min(static_cast<int64_t>(a), static_cast<int64_t>(b)));
  });
}

}  // namespace

const WarpOperation kShuffle{"__shfl_sync", shuffle_lanes};
const WarpOperation kShuffleUp{"__shfl_up_sync", shuffle_lanes};
const WarpOperation kShuffleDown{"__shfl_down_sync", shuffle_lanes};
const WarpOperation kShuffleXor{"__shfl_xor_sync", shuffle_lanes};
const WarpOperation kSyncWarp{"__syncwarp", do_nothing};
const WarpOperation kBallot{"__ballot_sync", ballot};
const WarpOperation kAny{"__any_sync", reduce_or};
const WarpOperation kAll{"__all_sync", reduce_and};
const WarpOperation kMatchAny{"__match_any_sync", match_any};
const WarpOperation kReduceAdd{"__reduce_add_sync", reduce_add};
const WarpOperation kReduceMax{"__reduce_max_sync", reduce_max};
const WarpOperation kReduceMin{"__reduce_min_sync", reduce_min};
const WarpOperation kReduceMaxSigned{"__reduce_max_sync of int", reduce_max_signed};
const WarpOperation kReduceMinSigned{"__reduce_min_sync of int", reduce_min_signed};
const WarpOperation kReduceAnd{"__reduce_and_sync", reduce_and};
const WarpOperation kReduceOr{"__reduce_or_sync", reduce_or};
const WarpOperation kReduceXor{"__reduce_xor_sync", reduce_xor};

int segment_start(int width) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail("a shuffle of width " + std::to_string(width) + ", which is not a power of two up to 32");
  }
  return lane_index() & ~(width - 1);
}

}  // namespace fastopt::host_sim
