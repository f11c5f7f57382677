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

// One access of so many bytes.
template <int kBytes>
struct Access;
template <>
struct Access<16> {
  using type = uint4;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<4> {
  using type = unsigned;
};

// Whether kN elements can be accessed at once.
template <int kN, class Storage>
__device__ bool is_aligned(const Storage* address) {
  return reinterpret_cast<uintptr_t>(address) % (kN * sizeof(Storage)) == 0;
}

// kN elements as they are stored, in one access.
template <int kN, class Storage>
__device__ void read_all(const Storage* source, Storage* stored) {
  using Word = typename Access<kN * sizeof(Storage)>::type;
  const Word raw = *reinterpret_cast<const Word*>(source);
  memcpy(stored, &raw, sizeof raw);
}
template <int kN, class Storage>
__device__ void write_all(Storage* target, const Storage* stored) {
  using Word = typename Access<kN * sizeof(Storage)>::type;
  Word raw;
  memcpy(&raw, stored, sizeof raw);
  *reinterpret_cast<Word*>(target) = raw;
}

// The same of those that are there, in one access where all are and they are aligned.
template <int kN, class Storage>
__device__ void read_lanes(const Storage* source, bool aligned, LaneRange range, Storage* stored) {
  if (aligned && range.template is_full<kN>()) return read_all<kN>(source, stored);
#pragma unroll
  for (int lane = 0; lane < kN; ++lane) {
    stored[lane] = lane >= range.begin && lane < range.end ? source[lane] : Storage{};
  }
}
template <int kN, class Storage>
__device__ void write_lanes(Storage* target, bool aligned, LaneRange range, const Storage* stored) {
  if (aligned && range.template is_full<kN>()) return write_all<kN>(target, stored);
#pragma unroll
  for (int lane = 0; lane < kN; ++lane) {
    if (lane >= range.begin && lane < range.end) target[lane] = stored[lane];
  }
}

// The same, widened to the arithmetic type.
template <int kN, class Storage, class T>
__device__ void load_lanes(const Storage* source, bool aligned, LaneRange range, T* values) {
  if constexpr (kN > 1) {
    if (aligned && range.template is_full<kN>()) {
      Storage stored[kN];
      read_all<kN>(source, stored);
#pragma unroll
      for (int lane = 0; lane < kN; ++lane) values[lane] = load(stored + lane);
      return;
    }
  }
#pragma unroll
  for (int lane = 0; lane < kN; ++lane) {
    values[lane] = lane >= range.begin && lane < range.end ? load(source + lane) : T(0);
  }
}

// The same, rounded.
template <int kN, class Storage, class T>
__device__ void store_lanes(Storage* target, bool aligned, LaneRange range, const T* values) {
  if constexpr (kN > 1) {
    if (aligned && range.template is_full<kN>()) {
      Storage stored[kN];
#pragma unroll
      for (int lane = 0; lane < kN; ++lane) store(stored + lane, values[lane]);
      write_all<kN>(target, stored);
      return;
    }
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
