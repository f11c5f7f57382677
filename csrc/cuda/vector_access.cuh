#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtypes.h"
#include "cuda/launch.cuh"

namespace fastopt::cuda {

// The elements of one 16-byte access.
template <class Storage>
constexpr int kLanes = 16 / static_cast<int>(sizeof(Storage));

// Which of kN neighbouring elements there are: [begin, end).
struct LaneRange {
  int begin, end;

  template <int kN>
  __device__ bool is_full() const {
    return begin == 0 && end == kN;
  }
};

template <class Storage>
__device__ bool is_aligned(const Storage* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// kN elements widened to the arithmetic type, in one access where they are all there and aligned.
template <int kN, class Storage, class T>
__device__ void load_lanes(const Storage* source, bool aligned, LaneRange range, T* values) {
  Storage stored[kN];
  if (aligned && range.template is_full<kN>() && kN == kLanes<Storage>) {
    const uint4 raw = *reinterpret_cast<const uint4*>(source);
    memcpy(stored, &raw, sizeof stored);
#pragma unroll
    for (int lane = 0; lane < kN; ++lane) values[lane] = load(stored + lane);
    return;
  }
#pragma unroll
  for (int lane = 0; lane < kN; ++lane) {
    values[lane] = lane >= range.begin && lane < range.end ? load(source + lane) : T(0);
  }
}

// Rounded, and where all lanes are there and aligned in one access.
template <int kN, class Storage, class T>
__device__ void store_lanes(Storage* target, bool aligned, LaneRange range, const T* values) {
  if (aligned && range.template is_full<kN>() && kN == kLanes<Storage>) {
    Storage stored[kN];
#pragma unroll
    for (int lane = 0; lane < kN; ++lane) store(stored + lane, values[lane]);
    uint4 raw;
    memcpy(&raw, stored, sizeof raw);
    *reinterpret_cast<uint4*>(target) = raw;
    return;
  }
#pragma unroll
  for (int lane = 0; lane < kN; ++lane) {
    if (lane >= range.begin && lane < range.end) store(target + lane, values[lane]);
  }
}

// The value as it is read back once it has been stored.
template <class Storage, class T>
__device__ T rounded(T value) {
  Storage stored;
  store(&stored, value);
  return load(&stored);
}

// visit(first element, lanes that are there) for all elements of [start, end), 16-byte accesses of
// `base` first: a head and a tail that are not whole stay in one pack each. Called by a whole
// block.
template <class Storage, class Visitor>
__device__ void for_each_pack(const Storage* base, int64_t start, int64_t end,
                              const Visitor& visit) {
  constexpr int kN = kLanes<Storage>;
  const int64_t shift =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(base + start) % 16 / sizeof(Storage));
  for (int64_t first = start - shift + static_cast<int64_t>(threadIdx.x) * kN; first < end;
       first += static_cast<int64_t>(blockDim.x) * kN) {
    const int64_t head = start - first, left = end - first;
    visit(first, LaneRange{head > 0 ? static_cast<int>(head) : 0,
                           left < kN ? static_cast<int>(left) : kN});
  }
}

}  // namespace fastopt::cuda
