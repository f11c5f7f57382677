#pragma once

// Parameters and state between the way they are stored and fp32, a quad of neighbouring elements
// for a thread: the lanes of a warp have theirs one behind the other.

#include <type_traits>

#include "core/card_tasks.h"
#include "core/philox.h"
#include "core/state_codes.h"
#include "cuda/vector_access.cuh"

namespace fastopt::cuda {

constexpr int kQuad = 4;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
// Of a thread in a block of elements that share a scale.
constexpr int kQuads = kCodeBlock / (kWarp * kQuad);

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// Random words of a group for the places of the thread's quad. Called by whole warps.
__device__ inline void draw(const StateCoding& coding, int64_t step, int64_t group,
                            uint32_t (&words)[kQuad]) {
  // Of the lanes of a group (core/philox.h), four have the places of a quad. A thread computes one
  // of them, for those four threads 4 apart that need a word each, and they exchange.
  const int lane = lane_of_warp();
  const int own = lane % 4 * 4 + lane / 4 % 4;
  words[0] = static_cast<uint32_t>(group * kRandomLanes + own);
  words[1] = static_cast<uint32_t>(step);
  words[2] = static_cast<uint32_t>(coding.number);
  words[3] = 0;
  philox<ScalarWords>(words, coding.seed);
#pragma unroll
  for (int bit = 1; bit < kQuad; bit *= 2) {
    const bool is_upper = lane / 4 & bit;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i & bit) continue;
      const uint32_t sent = is_upper ? words[i] : words[i + bit];
      const uint32_t received = __shfl_xor_sync(kWholeWarp, sent, 4 * bit);
      (is_upper ? words[i] : words[i + bit]) = received;
    }
  }
}

template <SlotCode kCode>
struct SlotStorage;
template <>
struct SlotStorage<SlotCode::kFloat32> {
  using type = float;
};
template <>
struct SlotStorage<SlotCode::kBFloat16> {
  using type = BFloat16;
};
template <>
struct SlotStorage<SlotCode::kBlockwise8> {
  using type = uint8_t;
};

// A block of a slot.
template <SlotCode kCode>
struct CodedSlot {
  using Storage = typename SlotStorage<kCode>::type;

  Storage* data;
  float* largest;
  bool is_positive;  // known to the compiler
  bool is_aligned;

  __device__ CodedSlot(const DeviceTask& task, int slot, bool is_positive, int64_t start)
      : data(static_cast<Storage*>(task.operands[kFirstSlot + slot]) + start),
        largest(task.coding->largest[slot] + start / kCodeBlock),
        is_positive(is_positive),
        is_aligned(cuda::is_aligned<kQuad>(data)) {}

  __device__ void read(int first, LaneRange range, Storage* stored) const {
    read_lanes<kQuad>(data + first, is_aligned, range, stored);
  }

  // The block's largest magnitude so far.
  __device__ float before() const { return kCode == SlotCode::kBlockwise8 ? *largest : 0; }

  __device__ float decoded(Storage stored, float before) const {
    if constexpr (kCode == SlotCode::kBlockwise8) {
      const int extended = is_positive ? stored : static_cast<int8_t>(stored);
      const uint32_t byte = static_cast<uint32_t>(extended);
      return with_code([&](auto code) { return code.template decode<float>(byte, before); });
    } else {
      return fastopt::load(&stored);
    }
  }

  // The block's new elements; `words` are the state's. Called by whole warps.
  __device__ void store(const float (&values)[kQuads][kQuad], const int* firsts,
                        const LaneRange* ranges, const uint32_t* words) const {
    float scale = 1;
    if constexpr (kCode == SlotCode::kBlockwise8) {
      const float now = largest_of(values, ranges);
      if (lane_of_warp() == 0) *largest = now;
      scale = with_code([&](auto code) { return code.scale(now); });
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      Storage stored[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        stored[i] = encoded(values[q][i], scale, state_chance(words[i]));
      }
      write_lanes<kQuad>(data + firsts[q], is_aligned, ranges[q], stored);
    }
  }

 private:
  // visit(ByteCode)
  template <class Visitor>
  __device__ auto with_code(const Visitor& visit) const {
    return is_positive ? visit(ByteCode<false>()) : visit(ByteCode<true>());
  }

  __device__ Storage encoded(float value, float scale, uint32_t chance) const {
    if constexpr (kCode == SlotCode::kBlockwise8) {
      return static_cast<uint8_t>(
          with_code([&](auto code) { return code.encode(value, scale, code.rounding(chance)); }));
    } else if constexpr (kCode == SlotCode::kBFloat16) {
      return {static_cast<uint16_t>(near_bits(value, chance) >> 16)};
    } else {
      return value;
    }
  }

  // The largest magnitude; a NaN where there is one, or an infinity.
  static __device__ float largest_of(const float (&values)[kQuads][kQuad],
                                     const LaneRange* ranges) {
    uint32_t bits = 0;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const uint32_t magnitude = i < ranges[q].end ? bits_of(values[q][i]) & 0x7FFFFFFFu : 0;
        bits = magnitude > bits ? magnitude : bits;
      }
    }
    // Of numbers that are not negative, bits have the numbers' order; a NaN's are the largest.
    const float found = from_bits<float>(__reduce_max_sync(kWholeWarp, bits));
    return found + found * 0;
  }
};

// A block of a parameter, with what belongs to it beside its own bits.
template <class Storage>
struct CodedParam {
  static constexpr bool kHasCodes = std::is_same_v<Storage, BFloat16>;

  Storage* data;
  uint16_t* remainder;
  ParamCode code;
  bool is_aligned, remainder_is_aligned;

  __device__ CodedParam(const DeviceTask& task, int64_t start)
      : data(static_cast<Storage*>(task.operands[kParam]) + start),
        remainder(static_cast<uint16_t*>(task.coding->remainder) + start),
        code(task.coding->param),
        is_aligned(cuda::is_aligned<kQuad>(data)),
        remainder_is_aligned(cuda::is_aligned<kQuad>(remainder)) {}

  __device__ bool has_remainder() const {
    return kHasCodes && (code == ParamCode::kKahan || code == ParamCode::kMaster);
  }

  __device__ void load(int first, LaneRange range, float* values) const {
    load_lanes<kQuad>(data + first, is_aligned, range, values);
  }
  // Adds the remainder to what was loaded.
  __device__ void join(int first, LaneRange range, float* values) const {
    if (!has_remainder()) return;
    uint16_t lower[kQuad];
    read_lanes<kQuad>(remainder + first, remainder_is_aligned, range, lower);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const BFloat16 lost{lower[i]};
      values[i] = code == ParamCode::kKahan ? with_kahan_remainder(values[i], fastopt::load(&lost))
                                            : with_master_remainder(values[i], uint32_t{lower[i]});
    }
  }

  // `values` become what is stored; `place` is that of the first in its group.
  __device__ void store(int first, LaneRange range, const uint32_t* words, int64_t place,
                        float* values) const {
    uint16_t lost[kQuad] = {};
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      values[i] = encoded(values[i], param_chance(words[i], place), lost[i]);
    }
    store_lanes<kQuad>(data + first, is_aligned, range, values);
    if (has_remainder()) {
      write_lanes<kQuad>(remainder + first, remainder_is_aligned, range, lost);
    }
  }

 private:
  __device__ float encoded(float value, uint32_t chance, uint16_t& lost) const {
    if constexpr (kHasCodes) {
      if (code == ParamCode::kRounded) return rounded<Storage>(value);
      const uint32_t near =
          code == ParamCode::kStochastic ? near_bits(value, chance) : near_bits(value);
      if (code == ParamCode::kKahan) {
        lost = static_cast<uint16_t>(kahan_remainder(value, near) >> 16);
      } else if (code == ParamCode::kMaster) {
        lost = static_cast<uint16_t>(master_remainder(value, near));
      }
      return from_bits<float>(near & 0xFFFF0000u);
    } else {
      return rounded<Storage>(value);
    }
  }
};

}  // namespace fastopt::cuda
