#pragma once

#include <cstdint>

#include "core/elementary.h"
#include "core/update_rules.h"

namespace fastopt {

// How a state tensor is stored. The numbers are those of fastopt/backends/state_codes.py.
enum class SlotCode : int32_t {
  kAsParameter,
  kFloat32,
  kBFloat16,
  kBlockwise8,  // a byte for each element, and the largest magnitude of each block in fp32
};

// What a bf16 parameter is beside its own 16 bits.
enum class ParamCode : int32_t {
  kRounded,
  kStochastic,  // nothing, but rounded up or down by chance, in proportion
  kKahan,       // what rounding lost, in bf16: about 16 bits together (Kahan 1965)
  kMaster,      // what rounding lost, as the difference of the bits: exactly an fp32 number
};

// Of an element; a code of its own, not that of the parameter.
constexpr int64_t bytes_of(SlotCode code) {
  return code == SlotCode::kFloat32 ? 4 : code == SlotCode::kBFloat16 ? 2 : 1;
}

// Elements that share a scale.
constexpr int64_t kCodeBlock = 256;

// Random numbers of one parameter in one step are words of core/philox.h, with the parameter's
// number for a head and the step for a row. 4096 elements share a group of 64 words. The upper half
// of a word rounds the state of 64 elements, which nobody adds up. The lower half rounds the
// parameters, each turned by the golden section of its range against the one before, so that what
// is summed over a row of a matrix has smaller errors than if each drew for itself.
constexpr int64_t kElementsOfGroup = 4096;
constexpr uint32_t kGoldenTurn = 40503;  // of 2^16

// How one parameter and its state are stored where that is not simply in the parameter's dtype. The
// parameter is dense, and what belongs to it lies as it does.
struct StateCoding {
  SlotCode slots[kMaxSlots];
  float* largest[kMaxSlots];  // kBlockwise8: [blocks]
  ParamCode param;
  void* remainder;  // [numel] of 16 bits: kKahan, kMaster
  // Of the random numbers: the key, and what tells parameters and steps apart.
  uint64_t seed;
  int64_t number, step;
};

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

// What a word is for the state and the parameter of an element, by its place in the group. Both are
// below 2^16.
template <class Bits>
HOST_DEVICE Bits state_chance(Bits word) {
  return word >> 16;
}
template <class Bits>
HOST_DEVICE Bits param_chance(Bits word, int64_t place) {
  return (word + static_cast<uint32_t>(place) / 64 * kGoldenTurn) & 0xFFFFu;
}

// Bits of which the upper 16 are a bf16 next to the number: the nearest, of two equally near ones
// the larger; or either of the two, by a chance below 2^16, so that the mean is kept.
template <class V>
HOST_DEVICE BitsOf<V> near_bits(V value) {
  return unless_nan(value, bits_of(value) + 0x8000u);
}
template <class V>
HOST_DEVICE BitsOf<V> near_bits(V value, BitsOf<V> chance) {
  return unless_nan(value, bits_of(value) + chance);
}

// What a number has more than the bf16 in the upper half of `near`. Of a master that is the
// difference of the bits, of either sign, in 16 bits; of Kahan's sum the difference of the numbers,
// in the upper half again. Who sets a parameter leaves the remainder of the number before beside
// it: beside zero a difference of bits would be a NaN, and what is more than half a unit in the
// last place, at most a 256th, was never lost by rounding to that parameter.
template <class V>
HOST_DEVICE BitsOf<V> master_remainder(V value, BitsOf<V> near) {
  return unless_nan(value, bits_of(value)) - (near & 0xFFFF0000u);
}
template <class V>
HOST_DEVICE V with_master_remainder(V upper, BitsOf<V> remainder) {
  return number_or(from_bits<V>(bits_of(upper) + (remainder ^ 0x8000u) - 0x8000u), upper);
}
template <class V>
HOST_DEVICE BitsOf<V> kahan_remainder(V value, BitsOf<V> near) {
  return bits_of(value - from_bits<V>(near & 0xFFFF0000u)) + 0x8000u;
}
template <class V>
HOST_DEVICE V with_kahan_remainder(V upper, V remainder) {
  return upper + zero_below(remainder, magnitude(upper) - magnitude(remainder) * 256.0f, 0.0f);
}

// Bytes of a block are numbers relative to its largest magnitude, with four bits of exponent: three
// of mantissa beside a sign, or four for state that is never negative. 2^-15 is added before and
// taken away after, which makes of the smallest codes equal steps from zero on. A second moment
// changes by a thousandth in a step, far less than a code: rounded to the nearest it would hardly
// ever move. So codes are rounded by chance, as is bf16 state, and keep the mean.
template <bool kSigned>
struct ByteCode {
  static constexpr int kShift = kSigned ? 20 : 19;        // bits of fp32 that are cut off
  static constexpr uint32_t kBits = kSigned ? 127 : 255;  // without the sign
  static constexpr uint32_t kBase = 112u << 23;  // of kOffset; zeros where a code has its bits
  static constexpr float kOffset = 1.0f / 32768;

  // What elements are multiplied by before they are encoded. A block whose largest is next to
  // nothing is one of zeros.
  static HOST_DEVICE float scale(float largest) { return largest < 1e-37f ? 0.0f : 1 / largest; }

  // What is added to the bits of a number to round it by a chance below 2^16.
  template <class Bits>
  static HOST_DEVICE Bits rounding(Bits chance) {
    return (chance << (kShift - 16)) - kBase;
  }

  // The lowest byte of the result; the others are zero but in a block with a NaN.
  template <class V>
  static HOST_DEVICE BitsOf<V> encode(V value, float scale, BitsOf<V> rounding) {
    const V relative = multiply_add(kSigned ? magnitude(value) : value, scale, kOffset);
    const BitsOf<V> code = (bits_of(relative) + rounding) >> kShift;
    if constexpr (kSigned) {
      return code | (bits_of(value) >> 24 & 0x80u);
    } else {
      // A second moment of zero beside a first one would be a step without bounds.
      const BitsOf<V> one = BitsOf<V>{} + 1u;
      return code < one ? one : code;
    }
  }

  // `code` is the byte, extended by its sign where there is one.
  template <class V>
  static HOST_DEVICE V decode(BitsOf<V> code, float largest) {
    const V relative = from_bits<V>((code << kShift & kBits << kShift) | kBase);
    const V value = multiply_add(relative, largest, -kOffset * largest);
    return kSigned ? from_bits<V>(bits_of(value) | (code & 0x80000000u)) : value;
  }
};

FASTOPT_END_NAMESPACE
