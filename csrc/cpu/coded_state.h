#pragma once

// Tiles of parameters and state between the way they are stored and fp32.

#include <cstdint>
#include <type_traits>

#include "core/state_codes.h"
#include "cpu/optimizer_step.h"
#include "cpu/random.h"

FASTOPT_BEGIN_NAMESPACE

static_assert(kTile == kElementsOfGroup && kTile % kCodeBlock == 0);

// What the elements of a tile draw in a step, as core/state_codes.h says.
struct Draws {
  alignas(64) uint32_t of_params[kTile];
  alignas(64) uint32_t of_state[kRandomGroup];

  void make(const StateCoding& coding, int64_t start, int64_t size) {
    const int64_t group = start / kElementsOfGroup * kRandomGroup;
    random_row(coding.seed, coding.number, coding.step, group, group + kRandomGroup, of_state);
    if (coding.param != ParamCode::kStochastic) return;
    const int64_t groups = (size + kRandomGroup - 1) / kRandomGroup;
    random_row(coding.seed + kParamDraws, coding.number, coding.step, start,
               start + groups * kRandomGroup, of_params);
  }
  // Of the i-th elements of the tile, below 2^16. Vectors do not reach beyond a group.
  template <class V>
  BitsOf<V> for_param(int64_t i) const {
    return load_bits<BitsOf<V>>(of_params + i) & 0xFFFFu;
  }
  template <class V>
  BitsOf<V> for_state(int64_t i) const {
    return load_bits<BitsOf<V>>(of_state + i % kRandomGroup) >> 16;
  }
};

// fp32 to a bf16 next to it, by a chance below 2^16: the mean is kept.
template <class V>
HOST_DEVICE void store_by_chance(BFloat16* target, V value, BitsOf<V> chance) {
  store_low_halves(target, unless_nan(value, bits_of(value) + chance) >> 16);
}

template <class Storage>
void widen_tile(const Storage* source, int64_t n, float* values) {
  for_each_lanes<float>(
      n, [&](int64_t i, auto lanes) { store(values + i, load_as<decltype(lanes)>(source + i)); });
}

// A slot's elements from `start` on, a multiple of kTile.
class CodedSlot {
 public:
  CodedSlot(void* data, SlotCode code, float* largest, bool is_positive, int64_t start, int64_t n)
      : data_(static_cast<char*>(data) + start * bytes_of(code)),
        code_(code),
        largest_(largest + start / kCodeBlock),
        is_positive_(is_positive),
        size_(n) {}

  // The elements in fp32: where they lie, or in the buffer.
  float* decode(float* buffer) const {
    if (code_ == SlotCode::kFloat32) return reinterpret_cast<float*>(data_);
    if (code_ == SlotCode::kBFloat16) {
      widen_tile(reinterpret_cast<const BFloat16*>(data_), size_, buffer);
    } else if (is_positive_) {
      decode_blocks<ByteCode<false>>(buffer);
    } else {
      decode_blocks<ByteCode<true>>(buffer);
    }
    return buffer;
  }

  void encode(const float* values, const Draws& draws) const {
    if (code_ == SlotCode::kFloat32) return;  // changed in place
    if (code_ == SlotCode::kBFloat16) {
      BFloat16* const target = reinterpret_cast<BFloat16*>(data_);
      for_each_lanes<float>(size_, [&](int64_t i, auto lanes) {
        using V = decltype(lanes);
        store_by_chance(target + i, load_as<V>(values + i), draws.for_state<V>(i));
      });
    } else if (is_positive_) {
      encode_blocks<ByteCode<false>>(values, draws);
    } else {
      encode_blocks<ByteCode<true>>(values, draws);
    }
  }

 private:
  static int64_t bytes_of(SlotCode code) {
    return code == SlotCode::kFloat32 ? 4 : code == SlotCode::kBFloat16 ? 2 : 1;
  }

  template <class Code>
  void decode_blocks(float* values) const {
    for_each_block([&](const uint8_t* bytes, float& largest, int64_t begin, int64_t n) {
      const float scale = Code::from_relative(largest);
      for_each_lanes<float>(n, [&](int64_t i, auto lanes) {
        using V = decltype(lanes);
        const V relative = from_bits(Code::decode(load_bytes<BitsOf<V>>(bytes + i)));
        store(values + begin + i, relative * scale);
      });
    });
  }

  template <class Code>
  void encode_blocks(const float* values, const Draws& draws) const {
    for_each_block([&](uint8_t* bytes, float& largest, int64_t begin, int64_t n) {
      largest = largest_of(values + begin, n);
      const float scale = Code::to_relative(largest);
      for_each_lanes<float>(n, [&](int64_t i, auto lanes) {
        using V = decltype(lanes);
        const V relative = load_as<V>(values + begin + i) * scale;
        store_bytes(bytes + i, Code::encode(bits_of(relative), draws.for_state<V>(begin + i)));
      });
    });
  }

  template <class Visitor>
  void for_each_block(const Visitor& visit) const {
    for (int64_t begin = 0; begin < size_; begin += kCodeBlock) {
      const int64_t left = size_ - begin;
      visit(reinterpret_cast<uint8_t*>(data_) + begin, largest_[begin / kCodeBlock], begin,
            left < kCodeBlock ? left : kCodeBlock);
    }
  }

  // The largest magnitude; a NaN where there is one, or an infinity.
  static float largest_of(const float* values, int64_t n) {
    Vec<float> largest{}, nothing{};
    float rest = 0, nothing_of_rest = 0;
    for_each_lanes<float>(n, [&](int64_t i, auto lanes) {
      using V = decltype(lanes);
      const V value = magnitude(load_as<V>(values + i));
      if constexpr (sizeof(V) == sizeof(float)) {
        rest = at_least(value, rest);
        nothing_of_rest += value * 0;
      } else {
        largest = at_least(value, largest);
        nothing = nothing + value * 0.0f;
      }
    });
    return at_least(largest_lane(largest), rest) + sum_of_lanes(nothing) + nothing_of_rest;
  }

  char* data_;
  SlotCode code_;
  float* largest_;
  bool is_positive_;
  int64_t size_;
};

// A parameter's elements from `start` on with what belongs to them beside their own bits.
template <class Storage>
class CodedParam {
 public:
  CodedParam(void* data, ParamCode code, void* remainder, int64_t start, int64_t n)
      : data_(static_cast<Storage*>(data) + start),
        code_(code),
        remainder_(static_cast<uint16_t*>(remainder) + start),
        size_(n) {}

  // The elements in fp32: where they lie, or in the buffer.
  float* decode(float* buffer) const {
    if constexpr (std::is_same_v<Storage, float>) return data_;
    for_each_lanes<float>(size_, [&](int64_t i, auto lanes) {
      using V = decltype(lanes);
      V value = load_as<V>(data_ + i);
      if (code_ == ParamCode::kKahan) {
        value = value + load_as<V>(reinterpret_cast<const BFloat16*>(remainder_ + i));
      } else if (code_ == ParamCode::kMaster) {
        const auto lower = load_halves<BitsOf<V>>(remainder_ + i);
        value = from_bits(bits_of(value) + (lower ^ 0x8000u) - 0x8000u);  // of either sign
      }
      store(buffer + i, value);
    });
    return buffer;
  }

  void encode(const float* values, const Draws& draws) const {
    if constexpr (std::is_same_v<Storage, float>) return;  // changed in place
    for_each_lanes<float>(size_, [&](int64_t i, auto lanes) {
      using V = decltype(lanes);
      const V value = load_as<V>(values + i);
      if constexpr (sizeof(Storage) == sizeof(BFloat16)) {
        if (code_ == ParamCode::kStochastic) {
          store_by_chance(reinterpret_cast<BFloat16*>(data_ + i), value, draws.for_param<V>(i));
          return;
        }
        if (code_ == ParamCode::kMaster) {
          // The nearest, of two equally near ones the larger: the difference fits 16 bits.
          const auto upper = unless_nan(value, bits_of(value) + 0x8000u) >> 16;
          store_low_halves(data_ + i, upper);
          store_low_halves(remainder_ + i, unless_nan(value, bits_of(value)) - (upper << 16));
          return;
        }
      }
      store(data_ + i, value);
      if (code_ == ParamCode::kKahan) {
        store(reinterpret_cast<BFloat16*>(remainder_ + i), value - load_as<V>(data_ + i));
      }
    });
  }

 private:
  Storage* data_;
  ParamCode code_;
  uint16_t* remainder_;
  int64_t size_;
};

// Elements in fp32: where they lie, or in the buffer.
inline float* widened_tile(float* source, int64_t, float*) { return source; }
template <class Storage>
float* widened_tile(const Storage* source, int64_t n, float* buffer) {
  widen_tile(source, n, buffer);
  return buffer;
}

FASTOPT_END_NAMESPACE
